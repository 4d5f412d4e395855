"""Words and names for the synthetic conversations of data.py.

Names in training are made of random syllables or random letters, so that copying a name never depends on having seen it.
Real names are kept for the held-out questions only.
"""

COMMON = """
apple answer arrow autumn baby bag ball bank basket beach bean bear bed bell bird boat book bottle bowl box branch bread bridge
brother bucket building bus butter cake camel camera candle car card carpet castle cat chair cheese cherry chicken child church
circle clock cloud coat coffee color corn cotton cousin cow cup curtain dance daughter day desk dinner doctor dog door dragon dream
dress drum duck dust ear earth egg engine evening eye face family farm father feather field fire fish flag floor flower fly foot forest
fork fox friend frog fruit game garden gate ghost gift girl glass goat gold grape grass guitar hair hammer hand hat head heart hill
history holiday honey horse hotel hour house ice idea island jacket jar juice jungle kettle key king kitchen kite knee knife ladder
lake lamp leaf leg lemon letter library light lion lunch machine magic map market mask meadow milk mirror money monkey month moon
morning mother mountain mouse mouth movie music nail neck needle nest night noise nose number ocean oil onion orange oven owl paint
palace paper park party path peach pear pen pencil people pepper phone piano picture pig pillow pizza plane planet plant plate pocket
poem potato prince pumpkin puzzle queen rabbit radio rain recipe ribbon rice ring river road robot rocket roof room rope rose sail salad
salt sand school sea season seed shadow sheep ship shirt shoe shop silver singer sister skirt sky snake snow soap sock song soup spider
spoon spring square stable star station stone storm story street sugar summer sun table tail tea teacher tent theater ticket tiger
toast tomato tower town toy train tree truck turtle uncle valley vegetable village violin voice wall watch water wave whale wheel
wind window wine wing winter wolf woman wood word world yard year zebra
""".split()

ADJECTIVES = """
angry big blue brave bright broken brown busy calm cheap clean clever cold dark deep dry early easy empty famous fast fat flat fresh full
funny gentle golden good great green happy hard heavy high hot huge hungry kind large late lazy light little local long loud low lucky
narrow new nice noisy old open pink poor pretty proud purple quick quiet red rich round sad safe sharp short shy silly simple slow small
smart smooth soft sour spicy strange strong sweet tall tasty thick thin tiny tired vegan warm weak wet white wide wild wise yellow young
""".split()

VERBS = """
bake bring build buy carry catch change clean climb close collect cook cut dance draw drink drive eat fill find fix fold follow forget grow
help hide hold jump keep kick kiss learn leave lift like look lose love make mix move need open paint pass pick plan plant play pull push put
read remember ride run sail save sell send share shut sing sit sleep smell speak start stop study swim take taste teach throw touch travel
try turn visit wait walk want wash watch wear win work write
""".split()

GLUE = "the a an my your our this that some every and or but with without near under over from into for of in on at by to about after before".split()

CONDITIONS = """
sunny cloudy rainy windy snowy foggy stormy clear overcast humid dry icy hazy warm cold cool hot mild misty wet freezing drizzling calm
""".split()
HELD_OUT_CONDITIONS = "breezy muggy chilly thundery gusty".split()

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens",
    "Ireland": "Dublin", "England": "London", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Peru": "Lima", "Cuba": "Havana", "Russia": "Moscow", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Australia": "Canberra", "Iceland": "Reykjavik", "Hungary": "Budapest", "Belgium": "Brussels",
    "Switzerland": "Bern", "the United States": "Washington", "the Netherlands": "Amsterdam",
}

# Only in held-out questions.
REAL_CITIES = """
Oslo|Paris|Berlin|Tokyo|Lisbon|San Francisco|New York|Rio de Janeiro|Kuala Lumpur|Reykjavik|Tbilisi|Ljubljana|Cape Town|Zagreb|
Hyderabad|Phnom Penh|Quito|Montevideo|Wellington|Edinburgh|Marseille|Gothenburg|Venice|Seville|Tampere|Vilnius|Odessa|Kyoto|Osaka|Boston|
Seattle|Chicago|Denver|Austin|Salt Lake City|Los Angeles|Buenos Aires|Addis Ababa|Dar es Salaam|Ho Chi Minh City|Santiago|Medellin|Havana|
Kingston|Porto|Naples|Turin|Lyon|Nantes|Dresden|Leipzig|Hamburg|Munich|Zurich|Geneva|Basel|Bergen|Trondheim|Aarhus|Malmo|Turku|Riga|Tallinn|
Minsk|Kharkiv|Lviv|Sofia|Varna|Skopje|Tirana|Patras|Izmir|Antalya|Beirut|Amman|Doha|Muscat|Karachi|Lahore|Mumbai|Chennai|Colombo|Dhaka|
Yangon|Hanoi|Manila|Cebu|Taipei|Busan|Sapporo|Perth|Hobart|Auckland|Suva|Honolulu|Anchorage|Vancouver|Calgary|Winnipeg|Halifax|Miami|Dallas|
Houston|Phoenix|Portland|Detroit|Luxembourg|Mexico City|Singapore|Tel Aviv|Kathmandu|Ulaanbaatar|Nairobi|Accra|Lagos|Dakar|Tunis|Rabat
""".replace("\n", "").split("|")

REAL_NAMES = """
Ada Grace Alan Linus Maria Sofia Oliver Emma Noah Liam Ava Mia Lucas Ethan Isabella Charlotte Amelia Henry James Benjamin Elijah Zoe Priya
Ravi Chen Yuki Hiroshi Fatima Omar Ingrid Lars Svetlana Boris Chloe Pierre Carlos Ana Mateo Valentina Kofi Amara Zanele Tariq
""".split()

_ONSETS = "b c d f g h j k l m n p q r s t v w x y z bl br ch cl cr dr fl fr gl gr kl kr ph pl pr sh sk sl sm sn sp st str th tr tw wh zh kh gh ts rh".split()
_NUCLEI = "a e i o u a e i o u y ai au ea ee ei ie oo ou ue ia io eu aa".split()
_CODAS = ["", "", "", ""] + "b d g k l m n p r s t x ck ld ll lm lt mp nd ng nk ns nt rd rk rn rt ss st th tz ch sh z v f dt ff w h".split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ACCENTED = "áàâäãåéèêëíìîïóòôöõøúùûüñçšžýłæœßğćő"
_FRONT = "New Old San Santa Port Saint Los Las El La Lake Mount North South East West Fort Great Upper Grand St. Le Al".split()
_MIDDLE = "de la of upon am del sur do da der en le di ob y".split()
_BACK = "City Town Bay Beach Falls Hill Springs Park Village Island Valley Lake Port River Mills Heights Junction".split()


def syllables(r, n):
    return "".join(r.choice(_ONSETS) * (r.random() < 0.85 or i > 0) + r.choice(_NUCLEI) + r.choice(_CODAS) * (i == n - 1 or r.random() < 0.4)
                   for i in range(n))


def letters(r, low=3, high=9):
    return "".join(r.choice(_LETTERS) for _ in range(r.randint(low, high)))


def pseudo(r):
    """A made-up lower-case word."""
    k = r.random()
    if k < 0.7:
        return syllables(r, r.choice((1, 2, 2, 2, 3, 3, 4)))
    if k < 0.85:
        return letters(r)
    w = r.choice(COMMON)
    i = r.randrange(len(w))
    return w[:i] + r.choice(_LETTERS) + w[i + r.randint(0, 1):] if r.random() < 0.6 else w + r.choice(("ton", "ia", "burg", "ville", "er", "ina", "o"))


def name_word(r):
    w = pseudo(r)
    if r.random() < 0.04:
        i = r.randrange(len(w))
        w = w[:i] + r.choice(_ACCENTED) + w[i + 1:]
    return w[0].upper() + w[1:]


def place(r):
    k = r.random()
    if k < 0.55:
        s = name_word(r)
    elif k < 0.66:
        s = r.choice(_FRONT) + " " + name_word(r)
    elif k < 0.74:
        s = name_word(r) + " " + (r.choice(_BACK) if r.random() < 0.5 else name_word(r))
    elif k < 0.80:
        s = name_word(r) + " " + r.choice(_MIDDLE) + " " + name_word(r)
    elif k < 0.84:
        s = r.choice(_FRONT) + " " + name_word(r) + " " + r.choice(_BACK)
    elif k < 0.87:
        s = name_word(r) + "-" + name_word(r)
    elif k < 0.89:
        s = name_word(r) + " " + name_word(r) + " " + name_word(r)
    elif k < 0.93:
        s = name_word(r) + ", " + name_word(r)
    elif k < 0.97:
        s = pseudo(r)
    else:
        s = r.choice(COMMON).capitalize()
    return s if s not in REAL_CITIES else place(r)


def person(r):
    s = name_word(r) if r.random() < 0.85 else r.choice(COMMON).capitalize()
    if r.random() < 0.12:
        s += " " + name_word(r)
    return s if s not in REAL_NAMES else person(r)


def any_word(r):
    k = r.random()
    if k < 0.3:
        return r.choice(COMMON)
    if k < 0.45:
        return r.choice(ADJECTIVES)
    if k < 0.55:
        return r.choice(VERBS)
    if k < 0.7:
        return r.choice(GLUE)
    return pseudo(r)


def phrase(r, low=1, high=6):
    """A few lower-case words, such as one types into a search box."""
    k = r.random()
    n = r.randint(low, high)
    if k < 0.35:
        words = [r.choice(ADJECTIVES), r.choice(COMMON)][-min(n, 2):] + [any_word(r) for _ in range(n - 2)]
    else:
        words = [any_word(r) for _ in range(n)]
    if r.random() < 0.15:
        i = r.randrange(len(words))
        words[i] = r.choice((words[i].capitalize(), words[i].upper(), str(r.randint(0, 3000))))
    return " ".join(words)


def sentence(r, low=3, high=10):
    words = [any_word(r) for _ in range(r.randint(low, high))]
    for i in range(len(words)):
        k = r.random()
        if k < 0.05:
            words[i] = name_word(r)
        elif k < 0.08:
            words[i] = str(r.randint(0, 999))
        elif k < 0.10 and i + 1 < len(words):
            words[i] += ","
    s = " ".join(words)
    return s[0].upper() + s[1:] + r.choice("...!?" if r.random() < 0.3 else "..")
