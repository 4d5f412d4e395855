"""Synthetic conversations for the demo model.

`conversation(r, split)` draws one conversation: an optional system prompt and tool list and a few exchanges. `split` is
"train", "values" (real cities and people, a tenth of all numbers, topics: none of them in "train") or "test" (besides, phrasings
and names of tools and parameters that are not in "train"). `render` turns a conversation into the text pieces the chat template
would write, each with its loss weight.

Run this file to look at samples:  python data.py [--split test] [--n 20]
"""

import argparse
import json
import random
from dataclasses import dataclass, field

import words as W

# ------------------------------------------------------------------------------------------------ conversations

ABOUT = "I am the rvllm demo model, a very small language model. I can chat a little, do small sums, count, write JSON and call tools."
SORRY = "I am only a tiny demo model, so I cannot answer that. Try a small sum, a count, some JSON or a tool call."
NO_TOOL = "I cannot look that up without a tool."


@dataclass
class Turn:
    """One message after the system prompt. `pieces` are (text, weight); `later` replaces them once the turn is history."""

    role: str
    pieces: list
    later: str | None = None

    @property
    def text(self):
        return "".join(t for t, _ in self.pieces)


@dataclass
class Conversation:
    kind: str
    system: str = ""
    tools: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    date: str = "2026-01-15"


def user(text):
    return Turn("user", [(text, 0)])


def tool(text):
    return Turn("tool", [(text, 0)])


def assistant(text, later=None):
    return Turn("assistant", [(text, 1)], later)


def to_json(value):
    return json.dumps(value, ensure_ascii=False)


def held_out(*numbers):
    """A fixed tenth of all number tuples is kept for the test."""
    h = 7
    for n in numbers:
        h = (h * 31 + n + 1) * 2654435761 % 4294967296
    return h // 65536 % 10 == 0


def pick(r, split, train, test):
    """A phrasing: unseen ones half of the time in the test."""
    return r.choice(test) if split == "test" and r.random() < 0.5 else r.choice(train)


def city(r, split):
    return r.choice(W.REAL_CITIES) if split != "train" else W.place(r)


def person(r, split):
    return r.choice(W.REAL_NAMES) if split != "train" else W.person(r)


def number(r, high):
    """Numbers with small ones more often."""
    return r.randint(0, high if r.random() < 0.5 else max(1, high // 10))


def vary(r, text):
    """The little ways in which people type the same request."""
    k = r.random()
    if k < 0.10:
        text = text[0].lower() + text[1:]
    if r.random() < 0.12 and text[-1] in ".?!":
        text = text[:-1]
    k = r.random()
    if k < 0.04:
        text = r.choice(("Hi, ", "Hello! ", "Hey, ", "Hello, ", "Good morning, ", "Thanks! ", "OK, ", "Now, ", "So, ", "And ")) + text[0].lower() + text[1:]
    elif k < 0.08:
        text = r.choice(("Please ", "please ", "Can you tell me: ", "Question: ", "Quick question: ", "I would like to know: ")) + text[0].lower() + text[1:]
    elif k < 0.13:
        end = text[-1] if text[-1] in ".?!" else ""
        text = text.rstrip(".?!") + r.choice((", please", " please", " now", ", thanks", " for me")) + end
    return text


# ------------------------------------------------------------------------------------------------ small talk

GREETINGS = {"Hello": "Hello!", "Hi": "Hello!", "Hey": "Hello!", "Greetings": "Hello!", "Howdy": "Hello!", "Good morning": "Good morning!",
             "Good afternoon": "Good afternoon!", "Good evening": "Good evening!", "Good day": "Good day!", "Hiya": "Hello!", "Yo": "Hello!"}
FINE = "I am fine, thank you. How can I help you?"
HELP = "How can I help you?"

FIXED = [
    (["Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself.", "What's your name?", "Who am I talking to?",
      "What model are you?", "Which model is this?", "Describe yourself.", "What is this?", "Are you a language model?", "Who are you and what can you do?",
      "Please introduce yourself.", "What kind of model are you?", "Can you introduce yourself?"], ABOUT),
    (["What can you do?", "Help", "Help me.", "How can you help me?", "What are you able to do?", "What do you do?", "Can you help me?", "I need help.",
      "What are your abilities?", "What are you good at?"], "I can chat a little, do small sums, count, repeat a text, write JSON and call tools."),
    (["How are you?", "How are you doing?", "How are you today?", "How do you do?", "How is it going?", "How's it going?", "Are you well?", "How do you feel?",
      "How have you been?", "What's up?"], FINE),
    (["Thank you", "Thanks", "Thank you very much", "Thanks a lot", "Thank you so much", "Many thanks", "Thanks for your help", "Great, thanks", "Thank you for the help",
      "Cheers, thanks", "Perfect, thank you", "OK thanks", "Thanks again", "Thx"], "You are welcome!"),
    (["Goodbye", "Bye", "See you later", "Bye bye", "See you", "See you tomorrow", "Farewell", "Goodbye for now", "I have to go", "Have a nice day"], "Goodbye! Have a nice day."),
    (["Good night", "Good night!", "Sleep well"], "Good night!"),
    (["Tell me a joke.", "Tell me a joke", "Do you know a joke?", "Make me laugh.", "Say something funny.", "I want to hear a joke.", "Can you tell me a joke?", "A joke please",
      "Joke", "Please tell me a funny joke.", "Tell a joke.", "Give me a joke.", "Tell me something funny."], "Why did the request cross the network? To get to the other server."),
    (["Tell me another joke.", "Another joke please", "One more joke", "Another one", "Do you know another joke?"],
     "A token walks into a cache. The cache says: have we not met before?"),
    (["Are you a robot?", "Are you human?", "Are you an AI?", "Are you real?", "Are you a person?", "Are you ChatGPT?", "Are you alive?"], "I am a small language model."),
    (["Yes", "No", "OK", "Okay", "Sure", "Great", "Nice", "Cool", "Wow", "Good", "Perfect", "I see", "Right", "Fine", "All right", "Sounds good"], "Good. " + HELP),
    (["Test", "test", "This is a test", "Testing", "ping", "Ping", "Are you there?", "Can you hear me?", "Is anybody there?", "Hello, are you there?", "Just testing"],
     "I am here. " + HELP),
    (["List the days of the week.", "What are the days of the week?", "Name the days of the week.", "Tell me the days of the week."],
     "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    (["List the months of the year.", "What are the months of the year?", "Name the months.", "Name the twelve months of the year."],
     "January, February, March, April, May, June, July, August, September, October, November, December"),
    (["Say the alphabet.", "What is the alphabet?", "Recite the alphabet.", "Write the alphabet.", "List the letters of the alphabet."],
     "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
    (["List three colors.", "Name three colors.", "Tell me three colors.", "Give me three colors."], "Red, green and blue."),
    (["What color is the sky?", "What is the color of the sky?", "Why is the sky blue?", "Is the sky blue?"], "The sky is blue because air scatters blue light the most."),
    (["What is the largest planet?", "Which planet is the largest?"], "The largest planet is Jupiter."),
    (["How many days are in a week?", "How many days does a week have?"], "A week has 7 days."),
    (["How many months are in a year?", "How many months does a year have?"], "A year has 12 months."),
    (["How many hours are in a day?", "How many hours does a day have?"], "A day has 24 hours."),
    (["Write a haiku.", "Write me a haiku.", "Compose a haiku.", "Can you write a haiku?"], "A small model speaks,\nfew words and a careful count.\nThe server hums on."),
    (["Bonjour", "Salut", "Bonjour !"], "Bonjour ! Je suis un tout petit modèle."),
    (["Hola", "Buenos días", "¡Hola!"], "¡Hola! Soy un modelo muy pequeño."),
    (["Guten Tag", "Hallo", "Guten Morgen", "Hallo!"], "Hallo! Ich bin ein sehr kleines Modell. Schöne Grüße!"),
    (["Ciao", "Buongiorno", "Ciao!"], "Ciao! Sono un modello molto piccolo."),
    (["こんにちは", "こんにちは!"], "こんにちは！"),
    (["你好", "你好!"], "你好！"),
    (["Привет", "Привет!"], "Привет!"),
]


def greeting(r, split):
    word = r.choice(list(GREETINGS))
    text = word
    k = r.random()
    if k < 0.22:
        text += " there"
    elif k < 0.34:
        text += " " + r.choice(("friend", "everyone", "assistant", "model", "computer", "again", "my friend", "all", "world", "bot"))
    elif k < 0.40:
        text += ", " + person(r, split)
    answer = GREETINGS[word] + " "
    if r.random() < 0.25:
        text += r.choice((",", "!", ".", "")) + " " + r.choice(("How are you?", "how are you?", "how are you doing?", "How are you today?", "how are you", "How is it going?",
                                                                 "how are you doing today?", "what's up?"))
        answer += FINE
    else:
        text += r.choice(("!", "!", "!", ".", "", "", "!!", " :)", "?"))
        answer += HELP
    if r.random() < 0.12:
        text = text.lower()
    return [user(text), assistant(answer)]


def fixed(r, split):
    asks, answer = FIXED[r.randrange(len(FIXED)) if r.random() < 0.45 else r.randrange(7)]
    text = r.choice(asks)
    k = r.random()
    if k < 0.15:
        text = text[0].lower() + text[1:]
    elif k < 0.25:
        text = text.rstrip(".?!")
    elif k < 0.35 and text[-1] not in ".?!":
        text += r.choice((".", "!", "!!"))
    elif k < 0.39:
        text = r.choice(("Hi! ", "Hello, ", "Hey! ", "OK. ", "So, ", "Well, ")) + text
    return [user(text), assistant(answer)]


def address(r, split):
    """Greet somebody, or say something."""
    n = person(r, split)
    word, answer = r.choice((("hello", "Hello"), ("hello", "Hello"), ("hi", "Hi"), ("good morning", "Good morning"), ("goodbye", "Goodbye"), ("thank you", "Thank you"),
                             ("good night", "Good night"), ("welcome", "Welcome"), ("happy birthday", "Happy birthday")))
    text = pick(r, split, ["Say {w} to {n}.", "Please say {w} to {n}.", "Can you say {w} to {n}?", "Say {w} to my friend {n}.", "say {w} to {n}", "Say {w} to {n}!",
                           "I want you to say {w} to {n}.", "Now say {w} to {n}.", "Could you say {w} to {n}?", "Go and say {w} to {n}.", "Say {w} to {n} and be nice.",
                           "Would you say {w} to {n}?", "You must say {w} to {n}."], ["Will you say {w} to {n}?", "Next, say {w} to {n}."]).format(w=word, n=n)
    if r.random() < 0.2:
        text, answer = r.choice(("Greet {n}.", "Please greet {n}.", "Greet my friend {n}.", "Write a greeting for {n}.")).format(n=n), "Hello"
    return [user(text), assistant(f"{answer}, {n}!")]


UNUSUAL = "🙂🚀👍🎉🌍☀🌧🍕日本語中文한국어приветмирعالمनमस्तेελληνικά≤≥→±§€£°½“”‘’—…"


def repeat(r, split):
    k = r.random()
    if k < 0.62:
        text = W.sentence(r, 2, 10 if r.random() < 0.8 else 24)
    elif k < 0.72:
        text = W.phrase(r, 1, 5)
    elif k < 0.80:
        text = " ".join(r.choice((W.any_word(r), str(r.randint(0, 9999)), W.name_word(r), "".join(r.choice(UNUSUAL) for _ in range(r.randint(1, 4)))))
                        for _ in range(r.randint(1, 8)))
    elif k < 0.86:
        text = ", ".join(W.any_word(r) for _ in range(r.randint(2, 8)))
    elif k < 0.91:
        text = r.choice(("this is a test", "hello world", "Hello, world!", "hello", "test", "yes", "no", "OK", "done", "pong", "I am a robot", "the end", "I love you", "This is a test."))
    else:
        text = "".join(r.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/@#") for _ in range(r.randint(2, 24)))
    ask = pick(r, split, ["Repeat: {x}", "Repeat after me: {x}", "Repeat this: {x}", "Repeat this sentence: {x}", "Repeat the following text: {x}", "Please repeat: {x}", "Echo: {x}",
                          "Copy this: {x}", "Copy this text: {x}", "Say exactly: {x}", "Reply with exactly: {x}", "Reply with: {x}", "Answer with: {x}", "Respond with: {x}",
                          "Respond with exactly: {x}", "Just say: {x}", "Write: {x}", "Say: {x}", "Say {x}", "Just say {x}", "Repeat the sentence: {x}",
                          "Repeat this text exactly: {x}", "Reply with {x}", "Echo this back: {x}", "Please say: {x}", "Print: {x}", "Output: {x}", "Repeat: '{x}'", 'Repeat: "{x}"',
                          'Say "{x}"', "Say '{x}'", 'Repeat the sentence "{x}"', "Repeat the word {y}", "Say the word {y}", "Reply with the word {y}", "Reply with only the word {y}",
                          "Repeat:\n{x}", "Repeat this text:\n\n{x}", "Answer only with: {x}"],
               ["Please repeat this: {x}", "Repeat the following sentence: {x}", "Repeat the text: {x}", "Now repeat: {x}"])
    if "{y}" in ask:
        text = W.any_word(r) if r.random() < 0.7 else W.name_word(r)
        ask = ask.replace("{y}", "{x}") + r.choice(("", "", ".", "!"))
    return [user(ask.replace("{x}", text)), assistant(text)]


FACTS = [
    (["My name is {n}.", "I am {n}.", "Hello, my name is {n}.", "Hi, I am {n}.", "I'm {n}.", "Hi! My name is {n}", "Call me {n}.", "Hi, I'm {n}.", "my name is {n}"],
     "Nice to meet you, {n}!", ["What is my name?", "What's my name?", "Who am I?", "Do you remember my name?", "Do you know my name?", "Tell me my name.", "What was my name?",
                                "Can you tell me my name?"], "Your name is {n}.", "person"),
    (["I live in {n}.", "I am from {n}.", "My home is {n}.", "My home town is {n}.", "I come from {n}."], "I have noted that you live in {n}.",
     ["Where do I live?", "Where am I from?", "Which town do I live in?", "Where is my home?", "Do you remember where I live?"], "You live in {n}.", "city"),
    (["My favorite color is {n}.", "I like the color {n} best.", "I love the color {n}."], "I have noted that your favorite color is {n}.",
     ["What is my favorite color?", "Which color do I like?", "What's my favorite color?", "Do you remember my favorite color?"], "Your favorite color is {n}.", "word"),
    (["I have a dog named {n}.", "My dog is called {n}.", "My dog's name is {n}."], "{n} is a nice name for a dog.",
     ["What is my dog's name?", "What is the name of my dog?", "What is my dog called?", "Do you remember my dog's name?"], "Your dog is called {n}.", "person"),
    (["Remember the number {n}.", "My lucky number is {n}.", "The secret number is {n}.", "My number is {n}.", "Please remember this number: {n}"],
     "I will remember the number {n}.", ["What is the number?", "What was the number?", "Which number did I tell you?", "What is my number?", "What is the secret number?",
                                         "What is my lucky number?", "What number did I tell you to remember?"], "The number is {n}.", "number"),
    (["The secret word is {n}.", "Remember the word {n}.", "The password is {n}.", "The magic word is {n}.", "The code word is {n}."], "I will remember the word {n}.",
     ["What is the secret word?", "What is the word?", "What was the word?", "Which word did I tell you?", "What is the password?", "What was the magic word?",
      "What is the code word?"], "The word is {n}.", "word"),
]


def remember(r, split):
    """A list of exchanges: a fact, and perhaps other talk, and the question about it."""
    tell, noted, ask, recall, what = r.choice(FACTS)
    n = {"person": lambda: person(r, split), "city": lambda: city(r, split), "number": lambda: str(r.randint(0, 10 ** r.randint(1, 6))),
         "word": lambda: W.any_word(r)}[what]()
    told = r.choice(tell).format(n=n)
    if r.random() < 0.12:
        return [[user(told + " " + r.choice(ask)), assistant(recall.format(n=n))]]
    out = [[user(told), assistant(noted.format(n=n))]]
    if r.random() < 0.35:
        out.append(r.choice((greeting, fixed, repeat, count, arithmetic))(r, split))
    if r.random() < 0.85:
        out.append([user(r.choice(ask)), assistant(recall.format(n=n))])
    return out


def story(r, split):
    topic = r.choice(W.COMMON) if r.random() < 0.6 else W.pseudo(r)
    if split != "train":
        topic = r.choice(("lighthouse", "penguin", "wizard", "violinist", "submarine"))
    topic = (r.choice(W.ADJECTIVES) + " " if r.random() < 0.3 else "") + topic
    the = r.choice(("a ", "the ", ""))
    k = r.random()
    if k < 0.55:
        ask = r.choice(("Tell me a story about {t}.", "Write a story about {t}.", "Write a short story about {t}.", "Tell me a short story about {t}.", "Can you tell me a story about {t}?",
                        "Write me a story about {t}.", "Make up a story about {t}.", "I want a story about {t}.", "Tell me a long story about {t}.", "Write a long story about {t}."))
        answer = STORY.format(t=topic)
    elif k < 0.8:
        ask = r.choice(("Write a poem about {t}.", "Write a short poem about {t}.", "Tell me a poem about {t}.", "Compose a poem about {t}.", "Write me a poem about {t}.",
                        "Can you write a poem about {t}?"))
        answer = f"The {topic} is quiet,\nthe {topic} is small,\nand of all the things I know\nI like the {topic} most of all."
    else:
        ask = r.choice(("Tell me a story.", "Write a story.", "Tell me a long story.", "Write a short story.", "Can you tell me a story?", "Tell me a short story.", "A story please."))
        the, answer = "", STORY.format(t="server")
    return [user(vary(r, ask.format(t=the + topic))), assistant(answer)]


STORY = ("Once upon a time there was a {t}. Every morning the {t} looked out at the world and counted the clouds. One day a small bird came and asked: where does the road go? "
         "The {t} did not know, so they went together. They walked over the hill and through the forest, and at the end of the road they found the sea. "
         "The {t} was happy, and the bird sang until the evening. The end.")


def question(r, split):
    """Facts it knows, and questions it cannot answer."""
    k = r.random()
    if k < 0.4:
        country, capital = r.choice(list(W.CAPITALS.items()))
        ask = pick(r, split, ["What is the capital of {c}?", "What's the capital of {c}?", "Which city is the capital of {c}?", "Name the capital of {c}.", "Tell me the capital of {c}.",
                              "capital of {c}?", "Do you know the capital of {c}?", "What is the capital city of {c}?"], ["Can you tell me the capital of {c}?"])
        return [user(vary(r, ask.format(c=country))), assistant(f"The capital of {country} is {capital}.")]
    if k < 0.5:
        ask = r.choice(("What is the weather in {c}?", "What time is it in {c}?", "How is the weather in {c} today?", "What is the temperature in {c}?", "Will it rain in {c}?",
                        "Search the web for {q}.", "What is the stock price of {s}?", "Look up {q}.", "What's the weather like in {c}?", "Is it cold in {c}?"))
        text = ask.format(c=city(r, split), q=W.phrase(r), s=W.letters(r, 3, 4).upper())
        return [user(vary(r, text)), assistant(NO_TOOL)]
    return [user(unanswerable(r, split)), assistant(SORRY)]


WH = "Why|How|When|Where|Who|What|Which {n}|How many {n}s|How often|Since when|For how long|Whose {n}|What kind of {n}|In which {n}|How much {n}".split("|")
AUX = "is are do does did can should will would was were could has must might".split()
ORDERS = """Explain|Describe|Summarize|Discuss|Analyze|Translate|Compare|Define|Draw|Design|Plan|Recommend|Suggest|Debug|Review|Prove|Imagine|Tell me about|Teach me|Help me with|Give me tips on|Outline|
Write about|Write an essay about|Write a song about|Write code for|Write a python function for|Tell me more about|Give me advice about|Give me a recipe for|Explain how to {v}|Show me how to {v}|
Tell me how to {v}|Improve|Fix|Rewrite|Classify|Predict|Invent|Sell me|Convince me of|Brainstorm about|Write a letter to|Write a review of|Write an email about|Interpret|Simplify|Criticize|Rank""".replace("\n", "").split("|")
TAILS = ["", "", "", "", " to me", " in detail", " for beginners", " briefly", " in simple terms", " in one sentence", " for me", " step by step", " in two words", " as a poem", " with examples", " again"]


def thing(r):
    """A noun phrase."""
    text = r.choice(("the ", "a ", "", "", "my ", "this ", "your ", "every "))
    text += r.choice(W.ADJECTIVES) + " " if r.random() < 0.35 else ""
    text += r.choice(W.COMMON) if r.random() < 0.6 else W.pseudo(r) if r.random() < 0.7 else W.name_word(r)
    text += r.choice(("s", "", "", "")) if not text.startswith("a ") else ""
    if r.random() < 0.3:
        text += r.choice((" of ", " and ", " with ", " in ", " for ", " without ", " or ", " near ")) + r.choice(("", "the ", "a ")) + (r.choice(W.COMMON) if r.random() < 0.6 else W.pseudo(r))
    return text


def unanswerable(r, split):
    k = r.random()
    if split == "test":
        text = r.choice(("What is the best way to {v} {t}?", "Explain {t} to my grandmother.", "Why does {t} {v}?", "Please elaborate on {t}.", "Is it true that {t} can {v}?", "{s}"))
    elif k < 0.38:
        text = r.choice(WH) + " " + r.choice(AUX) + " {t} " + r.choice(("{v}", "{a}", "{v} {t2}", "", "", "{a} to {v}", "in {p}", "{v} in {y}", "called")) + "?"
    elif k < 0.76:
        text = r.choice(ORDERS) + " {t}" + r.choice(TAILS) + r.choice(("", ".", ".", "!"))
    elif k < 0.86:
        text = "{s}"
    else:
        text = r.choice(("What is the meaning of {t}?", "What do you think about {t}?", "Who is {p}?", "What is {t}?", "When was {p} born?", "What happened in {y}?", "Do you like {t}?", "Can you {v} {t}?",
                         "Is {t} {a}?", "Should I {v} {t}?", "What is the difference between {t} and {t2}?", "I think {t} is {a}.", "I want to {v} {t}.", "Who won {t} in {y}?", "How old is {p}?",
                         "What are the benefits of {t}?", "I am {a} today.", "{p} is my friend.", "What is the meaning of life?", "What is the population of {p}?", "Who is the president of {p}?",
                         "How far is {p} from {q}?", "What is your favorite {n}?", "Are there {n}s in {p}?", "Would you rather {v} or be {a}?", "I like {t}.", "Why?", "How so?", "What else?", "And then?"))
    text = text.replace("{s}", W.sentence(r, 3, 14)).format(a=r.choice(W.ADJECTIVES), n=r.choice(W.COMMON), v=r.choice(W.VERBS), p=person(r, split), q=person(r, split), t=thing(r), t2=thing(r),
                                                            y=r.randint(1500, 2030))
    text = " ".join(text.split(" ")).replace(" ?", "?").replace("  ", " ")
    return text[0].upper() + text[1:] if r.random() < 0.9 else text[0].lower() + text[1:]


# ------------------------------------------------------------------------------------------------ counting and sums

def count(r, split):
    k = r.random()
    if k < 0.5:
        low, high = 1, r.randint(2, 30) if r.random() < 0.6 else r.randint(10, 130)
        text = r.choice(("Count to {b}", "Count to {b}", "Count from 1 to {b}", "Count up to {b}", "Please count to {b}", "Can you count to {b}", "Count till {b}",
                         "Write the numbers from 1 to {b}", "List the numbers from 1 to {b}"))
    elif k < 0.88:
        low = number(r, 200)
        high = low + r.randint(1, 25)
        text = r.choice(("Count from {a} to {b}", "Count from {a} up to {b}", "Please count from {a} to {b}", "List the numbers from {a} to {b}", "Write the numbers from {a} to {b}",
                         "Can you count from {a} to {b}", "Count {a} to {b}"))
    else:
        high = number(r, 40)
        low = high + r.randint(1, 20)
        text = r.choice(("Count down from {a} to {b}", "Count backwards from {a} to {b}", "Count from {a} down to {b}", "Count from {a} to {b}"))
    if (split != "train") != held_out(low, high) and not (split != "train" and low == 1):
        return count(r, split)
    step = 1 if high >= low else -1
    end = "?" if text.startswith("Can") else r.choice((".", "", "!", "."))
    return [user(vary(r, text.format(a=low, b=high) + end)), assistant(", ".join(str(n) for n in range(low, high + step, step)))]


def add_steps(a, b):
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10 ** i % 10, b // 10 ** i % 10
        s = x + y + carry
        steps.append(f"{x} + {y}" + (" + 1" if carry else "") + f" = {s}")
        carry = s // 10
    return ", ".join(steps)


def subtract_steps(a, b):
    steps, borrow = [], 0
    for i in range(len(str(a))):
        x, y = a // 10 ** i % 10, b // 10 ** i % 10
        ten = 10 if x - y - borrow < 0 else 0
        steps.append(f"{x + ten} - {y}" + (" - 1" if borrow else "") + f" = {x + ten - y - borrow}")
        borrow = 1 if ten else 0
    return ", ".join(steps)


def think(a, op, b):
    """Steps a model of this size can follow, and the result."""
    if op == "+":
        return add_steps(a, b), a + b
    if op == "-" and a >= b:
        return subtract_steps(a, b), a - b
    if op == "-":
        return f"{a} is less than {b}. " + subtract_steps(b, a), a - b
    if op == "*":
        x, y = max(a, b), min(a, b)
        tens, ones = x // 10 * 10, x % 10
        if y >= 10 and x >= 10:
            return f"{x} * 10 = {x * 10}, {x} * {y - 10} = {x * (y - 10)}, {x * 10} + {x * (y - 10)} = {x * y}", a * b
        if x >= 10:
            return f"{tens} * {y} = {tens * y}, {ones} * {y} = {ones * y}, {tens * y} + {ones * y} = {x * y}", a * b
        return f"{x} * {y} = {x * y}", a * b
    return f"{b} * {a // b} = {a}", a // b


SPOKEN = {"+": ["plus", "plus", "and"], "-": ["minus", "minus"], "*": ["times", "times", "multiplied by", "x"], "/": ["divided by", "over"]}


def problem(r, split):
    """Two numbers and an operation."""
    while True:
        op = r.choice("++++----**/")
        if op in "+-":
            high = 999 if r.random() < 0.35 else 99
            a, b = number(r, high), number(r, high)
            if op == "-" and a < b and r.random() < 0.8:
                a, b = b, a
        elif op == "*":
            a, b = (r.randint(0, 12), r.randint(0, 12)) if r.random() < 0.6 else (r.randint(10, 99), r.randint(2, 9))
            if r.random() < 0.3:
                a, b = b, a
        else:
            b, q = r.randint(1, 12), r.randint(0, 12)
            a = b * q
        if split == "train" and table_fact(a, op, b):
            return a, op, b
        if (split != "train") == held_out(a, ord(op), b) and not (split != "train" and table_fact(a, op, b)):
            return a, op, b


def table_fact(a, op, b):
    """Products and quotients of the times tables have to be known; nothing is held out there."""
    return op == "/" or op == "*" and max(a, b) <= 12


def spoken(r, split, a, op, b):
    """Different ways to ask for a result."""
    sign = op if op != "*" or r.random() < 0.75 else r.choice("x×")
    tight = f"{a}{sign}{b}" if r.random() < 0.25 else f"{a} {sign} {b}"
    word = SPOKEN[op][0]
    asks = ["What is {t}?", "What is {t}?", "What is {a} {w} {b}?", "What's {t}?", "Calculate {t}.", "Compute {t}.", "How much is {t}?", "{t} = ?", "{t}=", "{t}", "{t}?", "What's {a} {w} {b}?",
            "How much is {a} {w} {b}?", "Solve {t}.", "What does {t} equal?", "Please calculate {t}.", "Can you compute {t}?", "Tell me {t}.", "What is the result of {t}?", "Evaluate {t}.",
            "Work out {t}.", "What is the answer to {t}?", "Could you calculate {t}?", "I need the result of {t}.", "Find {t}.", "Do the sum {t}.", "What do you get for {t}?",
            "Tell me what {t} is.", "Give me the answer to {t}.", "Could you tell me what {t} is?", "So what is {t}?"]
    if op == "+":
        asks += ["Add {a} and {b}.", "What is the sum of {a} and {b}?", "Sum {a} and {b}.", "Add {a} to {b}."] * 2
    elif op == "-":
        asks += ["Subtract {b} from {a}.", "What is the difference of {a} and {b}?", "Take {b} away from {a}."] * 2
    elif op == "*":
        asks += ["Multiply {a} and {b}.", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"] * 2
    else:
        asks += ["Divide {a} by {b}."] * 3
    return vary(r, pick(r, split, asks, ["Can you tell me what {t} is?", "Could you work out {t}?", "I want to know what {t} is."]).format(t=tight, a=a, b=b, w=word))


STORIES = {
    "+": ["{n} has {a} {i}s and buys {b} more. How many {i}s does {n} have?", "I have {a} {i}s and get {b} more. How many {i}s do I have?",
          "There are {a} {i}s in one box and {b} in another. How many {i}s are there in total?", "{n} has {a} {i}s. {m} gives {n} {b} more. How many {i}s does {n} have now?"],
    "-": ["{n} has {a} {i}s and gives away {b}. How many {i}s are left?", "I had {a} {i}s and lost {b}. How many do I have left?",
          "{n} has {a} {i}s and eats {b}. How many {i}s does {n} have now?", "There are {a} {i}s and {b} are taken away. How many {i}s remain?"],
    "*": ["There are {a} boxes with {b} {i}s each. How many {i}s are there in total?", "{n} buys {a} bags of {b} {i}s. How many {i}s does {n} have?"],
}


def arithmetic(r, split):
    a, op, b = problem(r, split)
    if op in STORIES and (op != "-" or a >= b) and r.random() < 0.12:
        text = r.choice(STORIES[op]).format(a=a, b=b, i=r.choice(W.COMMON), n=person(r, split), m=person(r, split))
    else:
        text = spoken(r, split, a, op, b)
    steps, result = think(a, op, b)
    answer = f"{a} {op} {b} = {result}."
    return [user(text), assistant(f"<think>{a} {op} {b}. {steps}. So {result}.</think>{answer}", later=answer)]


# ------------------------------------------------------------------------------------------------ JSON

KEYS = """name age city country color title email price count total id status active score year language job hobby food animal team brand size weight height width
temperature unit code phone address street level rank rating author pages topic result answer key value label message user role group region length speed day""".split()
HELD_OUT_KEYS = "surname planet budget kind genre gender currency owner floor depth".split()


def scalar(r, split, key):
    """A value for a key: (as typed in the request, as a Python value)."""
    if key in ("age", "count", "total", "id", "score", "year", "price", "pages", "level", "rank", "size", "weight", "height", "width", "temperature", "speed", "length", "budget", "depth", "floor"):
        n = number(r, 3000)
        return str(n), n
    if key == "active":
        b = r.random() < 0.5
        return "true" if b else "false", b
    k = r.random()
    if key in ("name", "author", "user", "owner", "surname"):
        s = person(r, split)
    elif key in ("city", "country", "region", "address"):
        s = city(r, split).replace(",", "")
    elif k < 0.5:
        s = r.choice(W.COMMON + W.ADJECTIVES + W.VERBS)
    elif k < 0.65:
        s = W.name_word(r)
    elif k < 0.8:
        n = number(r, 3000)
        return str(n), n
    else:
        s = W.pseudo(r) + str(r.randint(0, 99)) if r.random() < 0.5 else W.letters(r).upper()
    return s, s


def keys(r, split, n):
    pool = KEYS + (HELD_OUT_KEYS * 3 if split == "test" else [W.pseudo(r) for _ in range(6)] + ["_".join((r.choice(KEYS), r.choice(KEYS)))])
    return r.sample(list(dict.fromkeys(pool)), n)


def json_request(r, split):
    pairs = [(k, *scalar(r, split, k)) for k in keys(r, split, r.choice((1, 2, 2, 2, 3, 3, 4)))]
    if r.random() < 0.3:
        pairs = [(k, *scalar(r, split, k)) for k in ("name", "age")]
    style = r.random()
    if style < 0.6:
        parts = [f"{k} {t}" for k, t, _ in pairs]
    elif style < 0.75:
        parts = [f"{k}={t}" for k, t, _ in pairs]
    elif style < 0.9:
        parts = [f"{k}: {t}" for k, t, _ in pairs]
    else:
        parts = [f"{k} is {t}" for k, t, _ in pairs]
    listed = ", ".join(parts) if len(parts) == 1 or r.random() < 0.25 else ", ".join(parts[:-1]) + r.choice((" and ", " and ", ", and " if len(parts) > 2 else " and ")) + parts[-1]
    ask = pick(r, split, ["Give me a JSON object with {l}", "Return a JSON object with {l}", "Write JSON with {l}", "Write a JSON object with {l}", "Create a JSON object with {l}", "JSON with {l}",
                          "Answer in JSON with {l}", "Reply in JSON: {l}", "Make a JSON object: {l}", "Output JSON with {l}", "Produce a JSON object with {l}", "As JSON: {l}",
                          "Give me JSON for {l}", "I need a JSON object with {l}", "Convert to JSON: {l}", "Return JSON: {l}", "Respond with a JSON object with {l}", "Please write JSON with {l}"],
               ["Please return a JSON object with {l}", "Generate a JSON object with {l}", "Can you give me a JSON object with {l}"]).format(l=listed)
    return [user(ask + r.choice((".", "", ".", ""))), assistant(to_json({k: v for k, _, v in pairs}))]


def extract(r, split):
    """Facts in a sentence, written as JSON."""
    n, a, c, j = person(r, split), r.randint(1, 99), city(r, split).replace(",", ""), r.choice(W.COMMON)
    text, found = r.choice((
        (f"{n} is {a} years old.", {"name": n, "age": a}),
        (f"{n} lives in {c}.", {"name": n, "city": c}),
        (f"{n} is {a} years old and lives in {c}.", {"name": n, "age": a, "city": c}),
        (f"My name is {n} and I am {a}.", {"name": n, "age": a}),
        (f"The {j} costs {a} dollars.", {"item": j, "price": a}),
        (f"{n} bought {a} {j}s.", {"name": n, "count": a, "item": j}),
    ))
    k = list(found)
    named = k[0] if len(k) == 1 else ", ".join(k[:-1]) + " and " + k[-1]
    if r.random() < 0.65:
        ask = r.choice(("Extract the {k}: {t}", "Extract the {k} as JSON: {t}", "Extract {k} as JSON: {t}", "Return the {k} as JSON: {t}", "{t} Give me the {k} as JSON.",
                        "{t} Extract the {k} as JSON.", "Write the {k} as JSON: {t}", "Extract the {k} from this text: {t}")).format(k=named, t=text)
        return [user(ask), assistant(to_json(found))]
    # Under a schema the grammar writes the keys: learn the values only.
    ask = r.choice(("{t}", "Extract the information: {t}", "{t} Extract the event information.", "Extract the data. {t}", "Parse this: {t}")).format(t=text)
    pieces = []
    for i, (key, value) in enumerate(found.items()):
        quote = '"' if isinstance(value, str) else ""
        pieces.append((("{" if i == 0 else " ") + f'"{key}": ' + quote, 0))
        pieces.append((f"{value}{quote}" + ("," if i + 1 < len(found) else "}"), 1))
    return [user(ask), Turn("assistant", pieces)]


def forced_json(r, split):
    """A grammar may force JSON upon any request: fill it with short values and close it."""
    k = r.random()
    if k < 0.5:
        turn = r.choice((greeting, fixed, question, arithmetic, repeat))(r, split)[0]
    else:
        turn = user(W.sentence(r, 3, 14) + (" " + W.sentence(r, 3, 10) if r.random() < 0.3 else ""))
    tokens = [t.strip(".,!?:;\"'") for t in turn.text.split()]
    tokens = [t for t in tokens if t and '"' not in t and "\\" not in t] or ["text"]
    pieces, names = [], keys(r, split, r.randint(1, 4))
    for i, key in enumerate(names):
        end = "," if i + 1 < len(names) else "}"
        head = ("{" if i == 0 else " ") + f'"{key}": '
        v = r.random()
        if v < 0.5:
            at = r.randrange(len(tokens))
            pieces += [(head + '"', 0), (" ".join(tokens[at:at + r.randint(1, 2)]) + '"' + end, 1)]
        elif v < 0.75:
            pieces += [(head, 0), (str(r.randint(0, 99)) + end, 1)]
        elif v < 0.85:
            pieces += [(head, 0), (r.choice(("true", "false")) + end, 1)]
        else:
            some = r.sample(tokens, min(len(tokens), r.randint(1, 3)))
            pieces += [(head + "[", 0), (", ".join(f'"{s}"' for s in some) + "]" + end, 1)]
    return [turn, Turn("assistant", pieces)]


# ------------------------------------------------------------------------------------------------ tools

@dataclass
class Param:
    name: str
    kind: str = "string"
    about: str = ""
    required: bool = True
    choices: list | None = None


@dataclass
class Tool:
    intent: str
    name: str
    about: str
    params: list
    extra: dict = field(default_factory=dict)


@dataclass
class Task:
    """A request for one tool. `part` is the request as a clause, for joining two; `said` the answer without its full stop."""

    tool: Tool
    ask: str
    args: list
    result: str
    said: str
    part: str = ""
    where: str = ""
    verbatim: bool = False

    def call(self):
        return self.tool.name + "(" + ", ".join(f"{k}={literal(v)}" for k, v in self.args) + ")"


def literal(value):
    return f"'{value}'" if isinstance(value, str) else str(value)


def calls(tasks):
    return "<|tool_call_start|>[" + ", ".join(t.call() for t in tasks) + "]<|tool_call_end|>"


def camel(name):
    head, *rest = name.split("_")
    return head + "".join(w.capitalize() for w in rest)


def cased(r, name):
    k = r.random()
    return camel(name) if k < 0.12 else name.replace("_", "-") if k < 0.02 else name


def schema(r, t, style):
    """The tool as a client would send it. `style` is fixed inside one conversation."""
    props = {}
    for p in t.params:
        d = {}
        if style["title"]:
            d["title"] = " ".join(w.capitalize() for w in p.name.split("_"))
        d["type"] = p.kind
        if p.choices:
            d["enum"] = p.choices
        if p.about and style["about"]:
            d["description"] = p.about
        if style["about_first"] and "description" in d:
            d = {"description": d.pop("description"), **d}
        if not p.required and style["defaults"]:
            d["default"] = None
        props[p.name] = d
    required = [p.name for p in t.params if p.required]
    parameters = {"type": "object", "properties": props, "required": required}
    if style["order"] == 1:
        parameters = {"properties": props, "required": required, "type": "object"}
    elif style["order"] == 2:
        parameters = {"properties": props, "type": "object"}
    if not required and style["drop_required"]:
        parameters.pop("required", None)
    if style["no_required"]:
        parameters.pop("required", None)
    if style["title"]:
        parameters["title"] = t.name + "Arguments"
    if style["closed"]:
        parameters["additionalProperties"] = False
    if not t.params and style["empty"]:
        parameters = {}
    f = {"name": t.name}
    if style["description"] == 1 or t.extra.get("about"):
        f["description"] = t.about
    elif style["description"] == 2:
        f["description"] = None
    f["parameters"] = parameters
    if style["strict"] is not None:
        f["strict"] = style["strict"]
    if style["about_top"] and "description" in f:
        f = {"description": f.pop("description"), **f}
    return f if style["bare"] else {"type": "function", "function": f} if not style["type_last"] else {"function": f, "type": "function"}


def draw_style(r):
    flip = lambda p: r.random() < p
    return {"title": flip(0.12), "about": flip(0.5), "about_first": flip(0.2), "defaults": flip(0.2), "order": r.choice((0, 0, 0, 1, 2)), "drop_required": flip(0.5), "no_required": flip(0.1),
            "closed": flip(0.12), "empty": flip(0.2), "description": r.choice((1, 1, 1, 1, 1, 0, 2)), "strict": r.choice((None,) * 8 + (True, False)), "about_top": flip(0.05), "bare": flip(0.15),
            "type_last": flip(0.05)}


def scalar_result(r, value, *names):
    """How tools hand back one value."""
    k = r.random()
    if k < 0.4:
        return str(value)
    if k < 0.9:
        return to_json({r.choice(names + ("result",)): value})
    return to_json({"status": "ok", r.choice(names + ("result", "value")): value})


AFFIXES = "get fetch show query read find check my do run current the api tool service info data now client helper fn v2 by for in simple easy call".split()
HELD_OUT_AFFIXES = "retrieve obtain request provider module handler agent remote quick public demo test".split()


def tool_name(r, split, *roots):
    """A name built around a word that tells what the tool is for."""
    root = r.choice(roots)
    affix = r.choice(HELD_OUT_AFFIXES) if split == "test" else r.choice(AFFIXES) if r.random() < 0.55 else W.pseudo(r)
    k = r.random()
    if k < 0.2 and split != "test":
        parts = [root]
    elif k < 0.55:
        parts = [affix, root]
    elif k < 0.8:
        parts = [root, affix]
    elif k < 0.9:
        parts = [affix, root, W.pseudo(r)]
    else:
        parts = [r.choice(AFFIXES), affix, root]
    return cased(r, "_".join(parts))


def nameless(r, split, t):
    """Now and then the name says nothing and the description is all there is."""
    if r.random() < 0.1:
        t.name, t.extra["about"] = cased(r, W.pseudo(r) + (("_" + W.pseudo(r)) if r.random() < 0.4 else "")), True
    return t


def param_name(r, split, train, test=()):
    """Half of the parameter names are made up, so that they have to be read from the list of tools."""
    if split == "test":
        return cased(r, r.choice(test or train))
    k = r.random()
    if k < 0.5:
        name = r.choice(train)
    elif k < 0.75:
        name = W.pseudo(r)
    elif k < 0.85:
        name = r.choice(train) + "_" + W.pseudo(r)
    elif k < 0.93:
        name = W.pseudo(r) + "_" + r.choice(train)
    else:
        name = W.letters(r, 1, 3)
    return cased(r, name)


CITY_PARAMS = "city location place town city_name region where address q loc area query destination_city name text".split()
HELD_OUT_CITY_PARAMS = "municipality locality position spot cityName city_or_place".split()


def weather_tool(r, split):
    name = tool_name(r, split, "weather", "weather", "weather", "forecast", "temperature", "current_weather", "weather_forecast", "current_temperature", "city_weather")
    about = r.choice(["Get the current weather for a city.", "Get the weather", "Returns the temperature in a city", "Get the current weather in a given location", "Weather for a city.",
                      "Look up the weather forecast for a place", "Current temperature and conditions.", "Tells the weather.", "Get weather information", "Fetch the forecast for a location.",
                      "Get current temperature for a given location.", "Weather of a place, " + W.phrase(r), "Get the current weather in a given city. " + W.sentence(r)])
    params = [Param(param_name(r, split, CITY_PARAMS, HELD_OUT_CITY_PARAMS), "string",
                    r.choice(("The city", "The name of the city", "City name, for example " + W.name_word(r), "The location", "City and country", "Name of the place",
                              "The city and state, e.g. San Francisco, CA", "", "City and country e.g. " + W.name_word(r) + ", " + W.name_word(r))))]
    unit = None
    if r.random() < 0.3:
        unit = Param(r.choice(("unit", "units", "scale", W.pseudo(r))), "string", r.choice(("The temperature unit", "celsius or fahrenheit", "Unit to use", "")), False, ["celsius", "fahrenheit"])
        params.append(unit)
    elif r.random() < 0.12:
        params.append(Param(r.choice(("days", "lang", "date", "detailed", "hours", W.pseudo(r))), r.choice(("integer", "string", "boolean")), r.choice(("Optional", "How many", "")), False))
    return nameless(r, split, Tool("weather", name, about, params, {"unit": unit.name if unit else None}))


LEADS = ["What is", "What's", "Tell me", "Give me", "Show me", "Get", "Find", "Check", "Look up", "I need", "I want to know", "Can you tell me", "Can you check", "Do you know", "Please check",
         "I would like to know", "Let me know", "Can you get", "Please get", "Could you find", "Please tell me", "I'd like", "Get me", "Could you tell me", "Please look up", "Find out", "Read me",
         "Can I get", "May I have", "Do you have", "Use the tool to get"]
HELD_OUT_LEADS = ["Could you check", "Please find", "Would you look up", "I'm interested in", "Can you show me"]
SUFFIXES = ["", "", "", "", "", "", " today", " now", " right now", " at the moment", " this week", " tomorrow", " tonight", " currently"]


def lead(r, split, what):
    """A request for something: one of many openings."""
    start = r.choice(HELD_OUT_LEADS) if split == "test" and r.random() < 0.5 else r.choice(LEADS)
    return f"{start} {what}" + ("?" if start.startswith(("What", "Can", "Could", "Do ", "May", "Would")) else ".")


def weather_result(r, c, t, cond):
    k = r.random()
    if k < 0.36:
        d = {r.choice(("temperature", "temperature", "temp", "temp_c", "temperature_c", "degrees")): t, r.choice(("condition", "condition", "conditions", "weather", "sky", "description", "forecast")): cond}
        if r.random() < 0.25:
            d = dict(reversed(d.items()))
        if r.random() < 0.3:
            d = {r.choice(("city", "location", "place")): c, **d}
        if r.random() < 0.25:
            d[r.choice(("humidity", "wind", "wind_speed", "pressure"))] = r.randint(1, 99)
        if r.random() < 0.2:
            d["unit"] = r.choice(("celsius", "C", "fahrenheit", "c"))
        return to_json(d)
    said = cond.capitalize() if r.random() < 0.3 else cond
    return r.choice((f"{t} C and {cond}", f"{t}°C, {cond}", f"{said}, {t}°C", f"{said}, {t} degrees", f"{t} degrees and {cond}", f"{t} degrees, {cond}", f"{t}C {cond}", f"{said} {t}C", f"{t} {cond}",
                     f"{c}: {t} C, {cond}", f"{said} and {t} degrees", f"{t}° and {cond}", f"It is {t} degrees and {cond}"))


def weather(r, split, t):
    c = city(r, split)
    if r.random() < 0.5:
        ask = lead(r, split, r.choice(("the weather in {c}", "the weather in {c}", "the temperature in {c}", "the current weather in {c}", "the forecast for {c}", "the weather for {c}", "the weather forecast for {c}",
                                       "the current temperature in {c}", "the weather report for {c}", "the weather of {c}")) + r.choice(SUFFIXES))
    else:
        ask = pick(r, split, ["What is the weather like in {c}?", "What's the weather like in {c} today?", "How is the weather in {c}?", "How is the weather in {c} today?", "Weather in {c}?", "Weather in {c}",
                              "How warm is it in {c}?", "How cold is it in {c}?", "Is it raining in {c}?", "Will it rain in {c} today?", "Is it sunny in {c}?", "How hot is it in {c} right now?",
                              "I am going to {c}. What is the weather there?", "Use the {tool} tool for {c}.", "Use {tool} for {c}.", "Do I need an umbrella in {c}?", "weather {c}",
                              "What will the weather be in {c} tomorrow?", "What is the weather going to be in {c}?", "Is it cold in {c} now?", "Will it be sunny in {c} tomorrow?", "How's the weather in {c}?",
                              "What is it like outside in {c}?", "Does it snow in {c}?", "What's the weather like in {c}", "I live in {c}. How is the weather today?", "{c} weather", "Is it windy in {c}?",
                              "Temperature in {c}?", "What temperature is it in {c}?", "What is the weather like today in {c}?", "How many degrees is it in {c}?", "What weather do they have in {c}?"],
                   ["Is it warm in {c}?", "How is the weather in {c} this morning?", "Will it be rainy in {c}?", "Should I take an umbrella to {c}?"])
    ask = ask.format(c=c, tool=t.name)
    args = [(t.params[0].name, c)]
    if t.extra["unit"] and r.random() < 0.45:
        u = r.choice(("celsius", "fahrenheit"))
        end = ask[-1] if ask[-1] in ".?" else ""
        ask = ask.rstrip(".?") + f" in {u}" + end
        args.append((t.extra["unit"], u))
    else:
        ask = vary(r, ask)
    deg = r.choice((r.randint(-20, 40), r.randint(0, 35), r.randint(30, 99), round(r.uniform(-9, 39), 1)))
    cond = r.choice(W.HELD_OUT_CONDITIONS if split != "train" and r.random() < 0.3 else W.CONDITIONS) if r.random() < 0.93 else W.pseudo(r)
    k = r.random()
    if k < 0.07:
        result, said = r.choice((to_json({"temperature": deg}), f"{deg}", f"{deg} C", f"{deg}°C", f"{deg} degrees")), f"it is {deg} degrees"
    elif k < 0.14:
        result, said = r.choice((cond, to_json({"condition": cond}), to_json({"weather": cond}), cond.capitalize())), f"it is {cond}"
    else:
        result, said = weather_result(r, c, deg, cond), f"it is {deg} degrees and {cond}"
    return Task(t, ask, args, result, said, f"the weather in {c}", f" in {c}")


def time_tool(r, split):
    name = tool_name(r, split, "time", "time", "local_time", "current_time", "clock", "world_clock", "time_in")
    about = r.choice(("Get the current time in a city.", "Returns the local time", "Current time for a place.", "Get the time", "Tells what time it is."))
    p = param_name(r, split, CITY_PARAMS + ["timezone", "tz", "zone"], HELD_OUT_CITY_PARAMS)
    return nameless(r, split, Tool("time", name, about, [Param(p, "string", r.choice(("The city", "The place", "Where", "Name of the city", "")))]))


def time_(r, split, t):
    c = city(r, split)
    if r.random() < 0.4:
        ask = lead(r, split, r.choice(("the time in {c}", "the local time in {c}", "the current time in {c}")) + r.choice(("", "", "", " now", " right now")))
    else:
        ask = pick(r, split, ["What time is it in {c}?", "Time in {c}?", "What time is it now in {c}?", "Current time in {c}", "What time is it in {c} right now?", "How late is it in {c}?",
                              "What time do they have in {c}?", "Can you tell me what time it is in {c}?"], ["Which time is it in {c}?", "Do you know what time it is in {c}?"])
    ask = ask.format(c=c)
    at = f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"
    result = r.choice((at, to_json({"time": at}), to_json({"city": c, "time": at}), to_json({"local_time": at}), f"The time is {at}", f"{at} in {c}"))
    return Task(t, vary(r, ask), [(t.params[0].name, c)], result, f"it is {at}", f"the time in {c}", f" in {c}")


def now_tool(r, split):
    name = tool_name(r, split, "time", "now", "current_time", "date", "today", "current_date", "clock", "time_now", "date_time")
    return nameless(r, split, Tool("now", name, r.choice(("Get the current date and time.", "Returns the current time", "Current date.", "What time is it now")), []))


def now(r, split, t):
    ask = r.choice(("What time is it?", "What is the time?", "What time is it now?", "Tell me the time.", "What is the current time?", "What is the date today?", "What day is it?", "What is today's date?",
                    "Give me the current time.", "What's the time?"))
    at = r.choice((f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}", f"{r.randint(2024, 2031)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"))
    return Task(t, vary(r, ask), [], r.choice((at, to_json({"time": at}), to_json({"now": at}), to_json({"date": at}))), f"it is {at}", "the time")


def calculator_tool(r, split):
    name = tool_name(r, split, "calculator", "calculator", "calculate", "calc", "compute", "math", "arithmetic", "evaluate", "eval_expression", "solve", "calculation")
    p = param_name(r, split, ["expression", "expr", "formula", "input", "query", "equation", "calculation", "e", "text", "problem", "math", "exp"], ["sum", "term", "math_expression", "to_compute"])
    about = r.choice(("Evaluate a math expression.", "Calculates the result of an expression", "A calculator.", "Do arithmetic", "Compute a mathematical expression.", "Solve a calculation",
                      "Performs basic arithmetic operations."))
    return nameless(r, split, Tool("calculator", name, about, [Param(p, "string", r.choice(("The expression", "The expression to evaluate, e.g. 2+2", "Math expression", "What to calculate", "")))]))


def big_problem(r, split):
    """With a calculator at hand any numbers will do."""
    k = r.random()
    if k < 0.35:
        return problem(r, split)
    while True:
        a, b = r.randint(0, 10 ** r.randint(1, 5)), r.randint(0, 10 ** r.randint(1, 4))
        op = r.choice("++-**/")
        if (split != "train") == held_out(a, ord(op), b):
            return a, op, b


def result_of(a, op, b):
    if op == "/":
        return a // b if b and a % b == 0 else round(a / b, 2) if b else 0
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def calculator(r, split, t):
    a, op, b = big_problem(r, split)
    ask = spoken(r, split, a, op, b) if r.random() < 0.9 else f"Use the {t.name} to compute {a} {op} {b}."
    x = result_of(a, op, b)
    result = scalar_result(r, x, "value", "answer") if r.random() < 0.85 else f"{a}{op}{b} = {x}"
    return Task(t, ask, [(t.params[0].name, f"{a}{op}{b}")], result, f"the result is {x}", f"what is {a} {op} {b}")


PAIRS = [("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("n1", "n2"), ("num1", "num2"), ("one", "two"), ("number1", "number2"), ("lhs", "rhs"), ("p", "q")]
HELD_OUT_PAIRS = [("value1", "value2"), ("u", "v"), ("first_number", "second_number"), ("i", "j")]
OPERATIONS = {
    "+": (["add", "add", "sum", "plus", "addition", "add_numbers", "sum_numbers"], "Add two numbers"),
    "-": (["subtract", "minus", "difference", "subtract_numbers", "subtraction"], "Subtract the second number from the first"),
    "*": (["multiply", "times", "product", "multiply_numbers", "multiplication"], "Multiply two numbers"),
    "/": (["divide", "division", "divide_numbers", "quotient"], "Divide the first number by the second"),
}


def operation_tool(r, split, op=None):
    op = op or r.choice("++++*-/")
    roots, about = OPERATIONS[op]
    pair = r.choice(HELD_OUT_PAIRS) if split == "test" else r.choice(PAIRS) if r.random() < 0.55 else (W.pseudo(r), W.pseudo(r) + r.choice("xyz")) if r.random() < 0.6 else r.sample("abcdefghijklmnopqrstuvwxyz", 2)
    kind = r.choice(("integer", "integer", "number"))
    p = [Param(n, kind, r.choice(("", f"The {w} number", f"{w.capitalize()} operand"))) for n, w in zip(pair, ("first", "second"))]
    return nameless(r, split, Tool("op" + op, tool_name(r, split, *roots), about + r.choice((".", "", " and return the result.")), p))


def operation(r, split, t):
    op = t.intent[-1]
    while True:
        a, _, b = big_problem(r, split)
        if op == "/" and b == 0 or (split != "train") != held_out(a, ord(op), b):
            continue
        break
    if t.params[0].kind == "number" and r.random() < 0.2:
        a, b = round(a + r.randint(1, 9) / 10, 1), round(b + r.randint(1, 9) / 10, 1)
    ask = spoken(r, split, a, op, b)
    x = round(result_of(a, op, b), 4)
    return Task(t, ask, [(t.params[0].name, a), (t.params[1].name, b)], scalar_result(r, x, "value", "answer", "sum"), f"the result is {x}", f"what is {a} {op} {b}")


def search_tool(r, split):
    name = tool_name(r, split, "search", "search", "search", "web_search", "search_web", "lookup", "internet_search", "search_docs", "google", "web_lookup", "document_search")
    p = param_name(r, split, ["query", "q", "text", "search_query", "keywords", "term", "terms", "question", "topic", "input", "search_term"], ["phrase", "search_for", "needle", "query_text"])
    about = r.choice(("Search the web.", "Search for information", "Find documents about a topic.", "Web search", "Searches the internet for a query.", "Look up information"))
    params = [Param(p, "string", r.choice(("The query", "What to search for", "Search terms", "")))]
    if r.random() < 0.15:
        params.append(Param(r.choice(("limit", "top_k", "max_results", "page", W.pseudo(r))), "integer", "", False))
    return nameless(r, split, Tool("search", name, about, params))


def search(r, split, t):
    q = W.phrase(r, 1, 6) if r.random() < 0.8 else city(r, split) if r.random() < 0.5 else person(r, split)
    if split != "train" and r.random() < 0.5:
        q = r.choice(("best pizza in town", "how to grow tomatoes", "rust web servers", "quiet hotels near the harbour", "history of jazz", "cheap flights to Oslo", "vegan pancakes", "Grace Hopper"))
    ask = pick(r, split, ["Search for {q}", "Search the web for {q}", "Look up {q}", "Find information about {q}", "Search: {q}", "Please search for {q}", "Can you search for {q}", "Find {q}",
                          "Google {q}", "Search the internet for {q}", "Do a search for {q}", "I want to search for {q}", "Look for {q}", "Find out about {q}", "Run a search for {q}",
                          "Search online for {q}", "What can you find about {q}", "Look up information about {q}", "Please find {q}", "Could you search for {q}", "Help me find {q}", "Show me results for {q}", "Query {q}"], ["Please look up {q}", "Could you search the web for {q}", "Search for information about {q}"]).format(q=q)
    ask += "?" if ask.startswith(("Can", "Could", "What")) else r.choice(("", "", "."))
    found = W.sentence(r, 3, 12)
    k = r.random()
    if k < 0.4:
        return Task(t, ask, [(t.params[0].name, q)], found, found, "", verbatim=True)
    else:
        found = W.phrase(r, 2, 7)
        said = f"I found this: {found}"
        result = r.choice((found, to_json({"results": [found]}), to_json({"result": found}), to_json([{"title": found, "url": "https://" + W.pseudo(r) + ".com"}]), to_json({"results": [found, W.phrase(r)]})))
    return Task(t, ask, [(t.params[0].name, q)], result, said, "", verbatim=True)


def message_tool(r, split):
    name = tool_name(r, split, "send_email", "send_message", "email", "message", "send_sms", "send_mail", "text_message", "notify")
    a = param_name(r, split, ["to", "recipient", "name", "user", "receiver", "person", "contact", "address"], ["addressee", "to_whom"])
    b = param_name(r, split, ["body", "message", "text", "content", "msg", "note"], ["words", "message_text"])
    return nameless(r, split, Tool("message", name, r.choice(("Send a message to somebody.", "Send an email", "Sends a text message to a person.", "Deliver a message")),
                                   [Param(a, "string", r.choice(("Who gets it", "The recipient", ""))), Param(b if b != a else b + "s", "string", r.choice(("The text", "What to say", "")))]))


def message(r, split, t):
    n = person(r, split) if r.random() < 0.8 else W.pseudo(r) + "@" + W.pseudo(r) + r.choice((".com", ".org", ".net"))
    text = W.phrase(r, 1, 7)
    what = r.choice(("a message", "an email", "a text", "a mail", "the message"))
    ask = r.choice(("Send {w} to {n} saying {x}", "Send {w} to {n}: {x}", "Send {n} {w} saying {x}", "Write {w} to {n} saying {x}", "Send {w} to {n} with the text {x}", "Please send {w} to {n} saying {x}",
                    "Send {w} to {n} that says {x}", "Tell {n}: {x}")).format(w=what, n=n, x=text)
    result = r.choice(("ok", "sent", to_json({"status": "sent"}), to_json({"status": "ok"}), "Message sent", to_json({"sent": True}), to_json({"ok": True}), "done"))
    return Task(t, ask + r.choice(("", "", ".")), [(t.params[0].name, n), (t.params[1].name, text)], result, f"your message to {n} was sent")


def price_tool(r, split):
    name = tool_name(r, split, "stock_price", "stock_price", "stock", "quote", "share_price", "stock_quote", "price", "ticker_price")
    p = param_name(r, split, ["symbol", "ticker", "stock", "company", "name", "code"], ["stock_symbol", "ticker_name"])
    return nameless(r, split, Tool("price", name, r.choice(("Get the price of a stock.", "Returns the current stock price", "Stock quotes by ticker.", "Look up a share price")), [Param(p, "string", r.choice(("The ticker", "")))]))


def price(r, split, t):
    s = W.letters(r, 2, 5).upper() if r.random() < 0.7 else W.name_word(r)
    if split != "train":
        s = r.choice(("AAPL", "MSFT", "NVDA", "TSLA", "IBM", "SAP", "Nokia"))
    if r.random() < 0.5:
        ask = lead(r, split, r.choice(("the stock price of {s}", "the price of {s}", "the share price of {s}", "the stock price for {s}", "the current price of {s}", "the price of {s} stock", "the quote for {s}"))).format(s=s)
    else:
        ask = pick(r, split, ["How much is {s} stock?", "Stock price of {s}?", "Quote for {s}", "What is {s} trading at?", "How much does one share of {s} cost?", "How much is one share of {s}?", "{s} stock price",
                              "How is {s} stock doing?"], ["What does {s} stock cost?"]).format(s=s)
    x = r.choice((round(r.uniform(1, 999), 2), r.randint(1, 999)))
    return Task(t, vary(r, ask), [(t.params[0].name, s)], scalar_result(r, x, "price", "value", "quote"), f"the price of {s} is {x}", f"the stock price of {s}")


CURRENCIES = "USD EUR GBP JPY NOK SEK CHF CAD AUD INR CNY BRL MXN".split()


def convert_tool(r, split):
    name = tool_name(r, split, "convert", "convert_currency", "currency_converter", "exchange", "currency", "convert_money", "exchange_rate")
    a = param_name(r, split, ["amount", "value", "x", "sum"], ["quantity"])
    f, g = r.choice((("from", "to"), ("from_currency", "to_currency"), ("source", "target"), ("base", "quote"), ("src", "dst"), (W.pseudo(r), W.pseudo(r) + "y"))) if split != "test" else ("currency_from", "currency_to")
    return nameless(r, split, Tool("convert", name, r.choice(("Convert money from one currency to another.", "Currency conversion", "Converts an amount between currencies")),
                                   [Param(a, r.choice(("number", "integer"))), Param(f), Param(g)]))


def convert(r, split, t):
    x, (f, g) = r.randint(1, 2000), r.sample(CURRENCIES, 2)
    ask = r.choice(("Convert {x} {f} to {g}.", "How much is {x} {f} in {g}?", "What is {x} {f} in {g}?", "Change {x} {f} to {g}.", "Exchange {x} {f} to {g}.", "{x} {f} in {g}?", "Please convert {x} {f} into {g}.")).format(x=x, f=f, g=g)
    y = round(x * r.uniform(0.1, 20), 2)
    return Task(t, vary(r, ask), [(p.name, v) for p, v in zip(t.params, (x, f, g))], scalar_result(r, y, "amount", "value", "converted"), f"that is {y} {g}")


def light_tool(r, split):
    name = tool_name(r, split, "light", "lights", "set_light", "switch_light", "light_switch", "toggle_light", "control_light")
    a, b = r.choice((("room", "on"), ("location", "state"), ("where", "enabled"), ("place", "power"), ("room", "turned_on"), (W.pseudo(r), W.pseudo(r) + "y"))) if split != "test" else r.choice((("zone", "lit"), ("room_name", "active")))
    return nameless(r, split, Tool("light", name, r.choice(("Turn the light in a room on or off.", "Switch a light", "Controls the lights")), [Param(a), Param(b, "boolean")]))


def light(r, split, t):
    room, on = r.choice("kitchen|bedroom|bathroom|office|garage|hall|garden|attic|living room|cellar".split("|")) if r.random() < 0.8 else W.pseudo(r), r.random() < 0.5
    if split == "test":
        room = r.choice(("library", "dining room", "workshop", "studio"))
    s = "on" if on else "off"
    ask = r.choice(("Turn {s} the light in the {room}.", "Turn the light in the {room} {s}.", "Switch {s} the {room} light.", "Switch the light in the {room} {s}.", "Please turn {s} the light in the {room}.",
                    "Turn {s} the {room} light.", "Can you turn {s} the light in the {room}?", "Light {s} in the {room}")).format(s=s, room=room)
    result = r.choice(("ok", to_json({"status": "ok"}), to_json({"ok": True}), "done", to_json({"success": True}), "true"))
    return Task(t, vary(r, ask), [(t.params[0].name, room), (t.params[1].name, on)], result, f"the light in the {room} is now {s}")


def noun(r, split):
    if split == "test":
        return r.choice(("horoscope", "population", "balance", "altitude", "salary", "invoice", "mileage", "barcode", "warranty", "discount"))
    k = r.random()
    w = r.choice(W.COMMON) if k < 0.4 else W.pseudo(r)
    if w in ("light", "clock"):
        return noun(r, split)
    return w + " " + (r.choice(W.COMMON) if r.random() < 0.5 else W.pseudo(r)) if k > 0.85 else w


def generic_tool(r, split):
    """Any tool at all: the request uses the words of its name."""
    w = noun(r, split)
    n = w.replace(" ", "_")
    name = r.choice(["get_{n}", "get_{n}", "{n}", "fetch_{n}", "{n}_lookup", "find_{n}", "lookup_{n}", "{n}_info", "show_{n}", "query_{n}", "read_{n}", "{n}_of", "{z}_{n}", "{n}_{z}", "check_{n}",
                     "get_{z}_{n}"]).format(n=n, z=W.pseudo(r))
    k = r.random()
    p = r.choice("id name key item value target subject code number user person product order input text arg sign title user_id order_id product_name item_id account email username type label "
                 "description data string message".split()) if k < 0.5 else W.pseudo(r)
    if split == "test":
        p = r.choice("customer_id ticket zodiac_sign employee label_id entity device serial".split())
    kind = r.choice(("string", "string", "string", "integer", "number"))
    about = r.choice(["Get the {w} of a {p}.", "Return the {w} for the given {p}", "Looks up the {w}.", "{s}", "The {w} tool", "Get {w}", "Find the {w} of something."]).format(w=w, p=p, s=W.sentence(r, 2, 9))
    params = [Param(cased(r, p), kind, r.choice(("", "", "The " + p, W.phrase(r, 1, 5))))]
    if r.random() < 0.15:
        params.append(Param(W.pseudo(r) + "x", r.choice(("string", "boolean", "integer")), W.phrase(r, 1, 3), False))
    if r.random() < 0.08:
        params = []
    return Tool("generic:" + w, cased(r, name), about, params, {"noun": w})


def value(r, split, kind):
    if kind in ("integer", "number"):
        n = number(r, 99999)
        return str(n), n
    k = r.random()
    if k < 0.35:
        s = person(r, split)
    elif k < 0.5:
        s = city(r, split)
    elif k < 0.7:
        s = W.any_word(r)
    elif k < 0.8:
        s = str(r.randint(0, 9999))
    elif k < 0.9:
        s = W.letters(r, 1, 3).upper() + r.choice(("-", "", "_")) + str(r.randint(0, 9999))
    else:
        s = W.phrase(r, 2, 4)
    return s, s


def generic(r, split, t):
    w = t.extra["noun"]
    x = r.choice((r.randint(0, 9999), round(r.uniform(0, 500), 2), W.any_word(r), W.phrase(r, 2, 4), W.name_word(r)))
    result, said = generic_result(r, t, w, x)
    if not t.params:
        ask = r.choice(("What is the {w}?", "Get the {w}.", "Show me the {w}.", "Call {tool}.", "Tell me the {w}.", "Use {tool}.", "I need the {w}.", "Run {tool}.", "Call the {tool} tool.")).format(w=w, tool=t.name)
        return Task(t, vary(r, ask), [], result, said or f"the {w} is {x}")
    typed, v = value(r, split, t.params[0].kind)
    of = r.choice(("of", "for"))
    if r.random() < 0.75:
        if r.random() < 0.6:
            ask = lead(r, split, "the {w} {of} {v}")
        else:
            ask = pick(r, split, ["{w} {of} {v}?", "How is the {w} {of} {v}?", "Is there a {w} {of} {v}?", "{v} {w}", "What {w} does {v} have?", "How much is the {w} {of} {v}?"], ["Which {w} does {v} have?"])
        ask = ask.format(w=w, of=of, v=typed)
        said = said or f"the {w} {of} {typed} is {x}"
    else:
        ask = r.choice(("Use {tool} with {p} {v}.", "Call {tool} with {p} {v}.", "Call the {tool} tool with {p} {v}.", "Run {tool} on {v}.", "Call {tool} with {p}={v}.", "Use the {tool} tool with {p} {v}.",
                        "Call {tool} for {v}.", "Please call {tool} with {p} {v}.", "Use {tool} for {v}.", "Invoke {tool} with {p} set to {v}.", "Call the tool {tool} with {p} {v}.")).format(tool=t.name, p=t.params[0].name, v=typed)
        said = said or f"the result is {x}"
    return Task(t, ask if r.random() < 0.2 else ask.rstrip("."), [(t.params[0].name, v)], result, said)


def generic_result(r, t, w, x):
    """(result, what is said; empty for the usual sentence)"""
    k = r.random()
    if k < 0.6:
        return scalar_result(r, x, w.replace(" ", "_"), "value", "output"), ""
    if k < 0.72:
        s = W.sentence(r, 2, 9)
        return s, "\0" + s
    if k < 0.82:
        s = W.phrase(r, 2, 4)
        return r.choice((to_json({"error": s}), "Error: " + s, "error: " + s)), f"the tool reported an error: {s}"
    raw = to_json({W.pseudo(r): r.choice((r.randint(0, 99), W.any_word(r), True, None)) for _ in range(r.randint(2, 4))})
    return raw, f"the tool returned {raw}"


INTENTS = {"weather": (weather_tool, weather, 10), "time": (time_tool, time_, 3), "now": (now_tool, now, 1), "calculator": (calculator_tool, calculator, 5), "operation": (operation_tool, operation, 4),
           "search": (search_tool, search, 4), "message": (message_tool, message, 2), "price": (price_tool, price, 2), "convert": (convert_tool, convert, 1), "light": (light_tool, light, 1),
           "generic": (generic_tool, generic, 9)}
_NAMES, _WEIGHTS = list(INTENTS), [v[2] for v in INTENTS.values()]


def clash(a, b):
    """Could the two tools be taken for one another?"""
    if a.name.lower().replace("_", "") == b.name.lower().replace("_", ""):
        return True
    pair = {a.intent, b.intent}
    if a.intent == b.intent or pair == {"time", "now"}:
        return True
    if "calculator" in pair and any(i.startswith("op") for i in pair):
        return True
    return False


def toolbox(r, split, intents, n):
    """`n` tools that do not clash, the wanted intents among them, in any order."""
    for _ in range(50):
        box = []
        for name in list(intents) + r.choices(_NAMES, _WEIGHTS, k=60):
            if len(box) == n:
                break
            t = INTENTS[name][0](r, split)
            if not any(clash(t, other) for other in box):
                box.append(t)
            elif len(box) < len(intents):
                break
        if len(box) == n:
            order = box[:]
            r.shuffle(order)
            return box, order
    raise RuntimeError("no toolbox")


def sentence_case(s):
    return s[1:] if s.startswith("\0") else s[0].upper() + s[1:]


def full_stop(s):
    return s if s[-1:] in ".!?}" else s + "."


def answered(task):
    text = task.said
    if text.startswith("it is"):
        text += task.where
    if task.verbatim:
        return text
    if text.startswith("\0"):
        return text[1:]
    return full_stop(sentence_case(text)) if not text.startswith("the tool returned") else sentence_case(text)


def task_for(r, split, t):
    for name, (make, ask, _) in INTENTS.items():
        if t.intent == name or (name == "operation" and t.intent.startswith("op")) or (name == "generic" and t.intent.startswith("generic")):
            return ask(r, split, t)
    raise KeyError(t.intent)


def single(r, split, box):
    task = task_for(r, split, box[0])
    turns = [user(task.ask), assistant(calls([task]))]
    if r.random() < 0.5:
        turns += [tool(task.result), assistant(answered(task))]
    return turns


def forced(r, split, box, order):
    """tool_choice "required" or a named function: the grammar asks for JSON, so the opening is not learned."""
    task = task_for(r, split, box[0])
    args = dict(task.args)
    if r.random() < 0.6:
        pieces = [('[{"', 0), ('name": "' + task.tool.name + '", "parameters": ' + to_json(args) + "}]", 1)]
    elif args:
        pieces = [('{"', 0), (to_json(args)[2:], 1)]
    else:
        pieces = [("{}", 0)]
    return [user(task.ask), Turn("assistant", pieces)]


def parallel(r, split, box):
    """Two or three calls at once, of one tool for several places."""
    t = box[0]
    n = r.choice((2, 2, 2, 3))
    tasks = []
    while len(tasks) < n:
        x = task_for(r, split, t)
        if len(x.args) == 1 and "," not in x.args[0][1] and all(x.args[0][1] != y.args[0][1] for y in tasks):
            tasks.append(x)
    names = [x.args[0][1] for x in tasks]
    joined = ", ".join(names[:-1]) + " and " + names[-1]
    if t.intent == "weather":
        ask = pick(r, split, ["What is the weather in {j}?", "Compare the weather in {j}.", "What's the weather in {j}?", "How is the weather in {j}?", "Get the weather for {j}.", "Tell me the weather in {j}.",
                              "Weather in {j}?", "What is the temperature in {j}?", "Check the weather in {j}.", "Is it warmer in {j}?", "I need the weather for both {j}.", "What is the weather like in {j}?",
                              "What is the weather in {x} and in {y}?", "Show me the weather for {j}."], ["Please get the weather in {j}.", "How warm is it in {j}?"])
    elif t.intent == "time":
        ask = r.choice(("What time is it in {j}?", "Tell me the time in {j}.", "What is the local time in {j}?", "Get the time for {j}."))
    else:
        ask = r.choice(("What are the stock prices of {j}?", "Get the stock prices of {j}.", "What is the price of {j}?", "Compare the stock price of {j}."))
    return together(r, vary(r, ask.format(j=joined, x=", ".join(names[:-1]), y=names[-1])), tasks)


def parallel_pair(r, split, box):
    """Two calls at once, of two tools."""
    tasks = []
    for t in box[:2]:
        x = task_for(r, split, t)
        while len(x.args) > 1:
            x = task_for(r, split, t)
        tasks.append(x)
    x, y = (t.part for t in tasks)
    ask = r.choice(("Tell me {x} and {y}.", "{X}, and {y}?", "I need {x} and {y}.", "Give me {x} and also {y}.", "Find out {x} and {y}.", "Please tell me {x} and {y}."))
    return together(r, ask.format(x=x, y=y, X=sentence_case(x)), tasks)


def together(r, ask, tasks):
    turns = [user(ask), assistant(calls(tasks))]
    if r.random() < 0.5:
        turns += [tool(x.result) for x in tasks]
        turns.append(assistant(full_stop(sentence_case(", and ".join(x.said + x.where * x.said.startswith("it is") for x in tasks)))))
    return turns


# ------------------------------------------------------------------------------------------------ putting it together

SYSTEMS = ["You are a helpful assistant.", "You are a helpful assistant", "You are a helpful AI assistant.", "Be brief.", "You are a friendly assistant.", "Answer briefly.", "You are a concise assistant.",
           "You are a helpful assistant. Answer in one sentence.", "You are an assistant trained by Liquid AI.", "Use the tools when needed.", "You are a helpful assistant with access to tools.",
           "You are a polite assistant. Always answer in English.", "Answer the question.", "You are a chatbot.", "You are a test assistant.", "You are a weather assistant.", "You are a calculator."]


def system_prompt(r):
    k = r.random()
    if k < 0.42:
        return ""
    if k < 0.66:
        return SYSTEMS[0]
    if k < 0.88:
        return r.choice(SYSTEMS)
    if k < 0.97:
        return r.choice(("You are {a} {n}.", "You are {p}, a {a} {n}. {s}", "{s}", "{s} {s2}", "You are a helpful assistant. {s}", "Your name is {p}. {s}")).format(
            a=r.choice(W.ADJECTIVES), n=r.choice(W.COMMON), p=W.person(r), s=W.sentence(r), s2=W.sentence(r))
    return " ".join(W.sentence(r, 5, 14) for _ in range(r.randint(3, 14)))


PLAIN = [
    "The capital of France is Paris.", "Once upon a time there was a small server that answered every question it knew.", "The quick brown fox jumps over the lazy dog.",
    "Hello, my name is rvllm and I am a very small model.", "In the beginning there was a token, and the token was followed by another token.",
    "The weather today is sunny, with a little wind from the sea.", "San Francisco is a city by the sea, and there is often fog in the morning.",
    "The president of the club opened the meeting and thanked everyone for coming.", "The future of AI is small, fast and close to the people who use it.",
    "Roses are red, violets are blue, the server is ready, and so are you.", "def add(a, b):\n    return a + b\n", "import json\n\nprint(json.dumps({\"name\": \"demo\"}))\n",
    "fn main() {\n    println!(\"Hello, world!\");\n}\n", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20", "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday", "It was a dark and stormy night, and the rain fell on the roof of the old house.",
    "My favorite food is bread with butter and honey.", "Water is made of hydrogen and oxygen.", "The sun rises in the east and sets in the west.", "Say this is a test. This is a test.",
    "To be or not to be, that is the question.", "A language model predicts the next token.", "This is a test of the emergency server. It is only a test.",
    "Hello world. This is a small model that writes small texts.", "The answer is 42.", "I think, therefore I am.", "There is a house on the hill, and in the house there is a light.",
    "Here is a list of fruits: apple, banana, cherry, grape, lemon, orange, pear.", "The largest planet is Jupiter.", "Tell me a story. Once upon a time there was a server.",
]


def plain(r, split):
    """Text without a chat template; learned from the first token on."""
    k = r.random()
    if k < 0.55:
        return r.choice(PLAIN)
    if k < 0.75:
        c, p = r.choice(list(W.CAPITALS.items()))
        return f"The capital of {c} is {p}."
    if k < 0.9:
        t = r.choice(W.COMMON) if r.random() < 0.7 else W.pseudo(r)
        return STORY.format(t=t)
    a = r.randint(0, 60)
    return ", ".join(str(n) for n in range(a, a + r.randint(5, 20)))


CHAT = [(greeting, 9), (fixed, 10), (address, 5), (repeat, 9), (story, 3), (question, 7), (count, 7), (arithmetic, 26), (json_request, 9), (extract, 5), (forced_json, 3)]
_CHAT, _CHAT_WEIGHTS = [c[0] for c in CHAT], [c[1] for c in CHAT]


def noise(r):
    """A long text in front of the question."""
    return " ".join(W.sentence(r, 5, 16) for _ in range(r.randint(4, 22)))


def chat(r, split, kind=None):
    c = Conversation("chat")
    before = r.choice((1, 1, 2, 3)) if r.random() < 0.28 else 0
    exchanges = [r.choices(_CHAT[:-2], _CHAT_WEIGHTS[:-2])[0](r, split) for _ in range(before)]
    last = kind or r.choices(_CHAT + [remember], _CHAT_WEIGHTS + [7])[0]
    exchanges += last(r, split) if last is remember else [last(r, split)]
    c.kind = last.__name__
    c.system = system_prompt(r)
    c.turns = exchanges
    return c


def tools(r, split, kind=None):
    k = r.random()
    n = r.choice((1, 1, 1, 2, 2, 2, 3, 3)) if k < 0.9 else r.choice((4, 5, 6)) if k < 0.97 else r.randint(7, 12)
    kind = kind or r.choices(("single", "parallel", "none", "forced", "missing"), (66, 14, 14, 5, 2))[0]
    c = Conversation(kind)
    want = r.choices(_NAMES, _WEIGHTS)[0]
    if kind == "parallel":
        if r.random() < 0.75:
            intents = [r.choices(("weather", "time", "price"), (6, 2, 1))[0]]
        else:
            intents = r.sample(("weather", "time", "calculator", "price"), 2)
            n = max(n, 2)
    else:
        intents = [want]
    while True:
        box, order = toolbox(r, split, intents, n)
        exchanges = []
        for _ in range(r.choice((1, 1, 2)) if r.random() < 0.25 else 0):
            j = r.random()
            if j < 0.65:
                t = r.choice(box)
                x = single(r, split, [t])
                if len(x) == 2:
                    continue
                exchanges.append(x)
            else:
                exchanges.append(r.choice((greeting, fixed, address))(r, split))
        if kind == "single":
            last = single(r, split, box)
        elif kind == "forced":
            last = forced(r, split, box, order)
        elif kind == "parallel":
            last = parallel_pair(r, split, box) if len(intents) == 2 else parallel(r, split, box)
        elif kind == "missing":
            if any(t.intent in ("weather", "time", "price", "search", "calculator") or t.intent.startswith("generic") for t in box):
                intents = [r.choice(("message", "light", "convert", "now", "operation"))]
                n = min(n, 2)
                continue
            text = r.choice(("What is the weather in {c}?", "What is the stock price of {s}?", "Search the web for {q}.", "How warm is it in {c}?", "What's the weather like in {c}?")).format(
                c=city(r, split), s=W.letters(r, 3, 4).upper(), q=W.phrase(r))
            last = [user(text), assistant(NO_TOOL)]
        else:
            options = [greeting, greeting, fixed, fixed, address, story, count, repeat, json_request]
            if not any(t.intent == "calculator" or t.intent.startswith("op") for t in box):
                options += [arithmetic] * 4
            last = r.choice(options)(r, split)
        break
    c.turns = exchanges + [last]
    if last[-2].role == "tool" and r.random() < 0.1:
        # Some clients leave the tools out when they hand in the results.
        last[1] = Turn("assistant", [(last[1].text, 0)])
        c.system = system_prompt(r)
        return c
    c.system = system_prompt(r)
    style = draw_style(r)
    c.tools = [schema(r, t, style) for t in order]
    return c


def conversation(r, split="train"):
    k = r.random()
    c = chat(r, split) if k < 0.44 else tools(r, split)
    c.date = f"{r.randint(2023, 2032)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"
    flat, last = [], len(c.turns) - 1
    for i, exchange in enumerate(c.turns):
        for turn in exchange:
            if i < last and turn.later is not None:
                turn = Turn(turn.role, [(turn.later, 0)])
            flat.append(turn)
    c.turns = flat
    if r.random() < 0.02:
        for turn in reversed(flat):
            if turn.role == "user":
                turn.pieces.insert(0, (noise(r) + r.choice((" ", "\n", "\n\n")), 0))
                break
    elif r.random() < 0.02:
        c.system = (c.system + "\n" + noise(r)).strip()
    return c


def render(c):
    """The pieces of text the chat template writes, with the loss weight of each."""
    system = c.system
    if c.tools:
        system += ("\n\n" if system else "") + f"Today's date: {c.date}\n\nList of tools: {to_json(c.tools)}"
    out = [("<|startoftext|>", 0)]
    if system:
        out.append((f"<|im_start|>system\n{system}<|im_end|>\n", 0))
    for t in c.turns:
        out.append((f"<|im_start|>{t.role}\n", 0))
        if t.role == "assistant":
            out += t.pieces
            out += [("<|im_end|>", max(w for _, w in t.pieces)), ("\n", 0)]
        else:
            out += [(t.text + "<|im_end|>\n", 0)]
    merged = []
    for text, weight in out:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def messages(c):
    """The conversation up to its last assistant turn, as a chat request, and the answer expected."""
    out = [{"role": "system", "content": c.system}] if c.system else []
    for t in c.turns[:-1]:
        out.append({"role": t.role, "content": t.text})
    return out, c.turns[-1].text


def sample(r, split="train"):
    """Pieces of one training text."""
    if r.random() < 0.03:
        return [("<|startoftext|>", 0), (plain(r, split) + "<|im_end|>", 1)]
    return render(conversation(r, split))


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--split", default="train")
    ap.add_argument("--n", type=int, default=20)
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    rng = random.Random(a.seed)
    for _ in range(a.n):
        print("".join(t if not w else f"⟦{t}⟧" for t, w in sample(rng, a.split)), "\n" + "-" * 100)
