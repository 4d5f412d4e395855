"""Structured outputs and forced tool calls through the OpenAI SDK, on a model that does not cooperate."""

import json
import pathlib
import random
import re
from enum import Enum

import jsonschema
import pytest
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Describe a person as JSON."}]
# Without a reasoning parser's help the demo model may think first; this keeps answers short.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


class Color(str, Enum):
    red = "red"
    blue = "blue"


class Pet(BaseModel):
    name: str
    color: Color | None


class Person(BaseModel):
    name: str
    age: int
    tags: list[str]
    pet: Pet


TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "Weather of a city", "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"]}}},
    {"type": "function", "function": {"name": "get_time", "parameters": {
        "type": "object", "properties": {"zone": {"enum": ["utc", "local"]}}, "required": ["zone"]}}},
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def ask(client, **more):
    extra = {**NO_THINKING, **more.pop("extra_body", {})}
    # Long strings are what a random model writes; the guard against endless ones is larger than the context.
    more.setdefault("temperature", 2.0)
    return client.chat.completions.create(model=more.pop("model", "demo"), messages=MESSAGES, extra_body=extra, **more)


def bounded(schema):
    """The schema with every string short, so that a random model gets to its end."""
    if isinstance(schema, dict):
        out = {key: bounded(value) for key, value in schema.items()}
        if out.get("type") == "string" and "enum" not in out:
            out.setdefault("maxLength", 6)
        if out.get("type") == "array":
            out.setdefault("maxItems", 2)
        return out
    return [bounded(part) for part in schema] if isinstance(schema, list) else schema


def test_parse_gives_the_pydantic_model(client):
    completion = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Person, temperature=0, max_tokens=400, extra_body=NO_THINKING)
    choice = completion.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(choice.message.parsed, Person)


def random_schema(rng, depth=0):
    kinds = ["integer", "number", "boolean", "null", "string", "enum", "pattern"] + (["array", "object", "any"] * 2 if depth < 3 else [])
    kind = rng.choice(kinds)
    if kind == "integer":
        low = rng.randrange(-99, 99)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(200)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": rng.randrange(1, 1000)}
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": 3 + rng.randrange(8)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "é\"", 1, 2.5, None, True, "x\\y"], rng.randrange(1, 5))}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice([r"^\d{3}-\d{4}$", "^[a-f0-9]{4,8}$", "^(yes|no)$"])}
    if kind == "array":
        low = rng.randrange(3)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + rng.randrange(3)}
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "object":
        properties = {f"p{i}": random_schema(rng, depth + 1) for i in range(rng.randrange(1, 4))}
        return {"type": "object", "properties": properties, "required": rng.sample(list(properties), rng.randrange(len(properties) + 1)),
                "additionalProperties": False}
    return {"type": kind}


@pytest.mark.parametrize("seed", range(25))
def test_random_schemas_at_temperature_two_validate(client, seed):
    schema = random_schema(random.Random(seed))
    completion = ask(client, max_tokens=1500, seed=seed, n=3, response_format={
        "type": "json_schema", "json_schema": {"name": "random", "schema": schema}})
    for choice in completion.choices:
        if choice.finish_reason == "length":
            continue
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)
    assert any(choice.finish_reason == "stop" for choice in completion.choices), schema


def test_a_pydantic_schema_at_temperature_two(client):
    schema = bounded(Person.model_json_schema())
    completion = ask(client, max_tokens=900, n=4, seed=1, response_format={
        "type": "json_schema", "json_schema": {"name": "person", "schema": schema}})
    whole = [choice.message.content for choice in completion.choices if choice.finish_reason == "stop"]
    assert whole
    for text in whole:
        Person.model_validate_json(text)


@pytest.mark.parametrize("constraint, pattern", [
    ({"regex": r"[a-z]{3}-\d{4}"}, r"[a-z]{3}-\d{4}"),
    ({"choice": ["positive", "negative"]}, "positive|negative"),
    ({"grammar": 'root ::= pair ("," pair){2}\npair ::= "(" [0-9] ")"'}, r"\(\d\)(,\(\d\)){2}"),
    ({"grammar": 'start: WORD " " WORD\nWORD: /[a-z]{2}/'}, "[a-z]{2} [a-z]{2}"),
    ({"structural_tag": json.dumps({"type": "structural_tag", "format": {
        "type": "tag", "begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]{2}"}, "end": "</n>"}})}, r"<n>\d\d</n>"),
])
def test_every_kind_on_chat_and_completions(client, constraint, pattern):
    chat = ask(client, max_tokens=60, extra_body={"structured_outputs": constraint}).choices[0]
    assert re.fullmatch(pattern, chat.message.content) and chat.finish_reason == "stop"
    completion = client.completions.create(
        model="demo", prompt="Hello", temperature=2.0, max_tokens=60, extra_body={"structured_outputs": constraint}).choices[0]
    assert re.fullmatch(pattern, completion.text) and completion.finish_reason == "stop"


def test_compact_json(client):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
    text = ask(client, extra_body={"structured_outputs": {"json": schema, "disable_any_whitespace": True}}, max_tokens=60)
    assert re.fullmatch(r'\{"a":(true|false),"b":(true|false)\}', text.choices[0].message.content)


def test_stop_strings_and_min_tokens_with_a_grammar(client):
    cut = ask(client, max_tokens=60, stop=["-"], extra_body={"structured_outputs": {"regex": r"[a-z]{3}-\d{4}"}}).choices[0]
    assert re.fullmatch("[a-z]{3}", cut.message.content) and cut.stop_reason == "-"
    longer = ask(client, max_tokens=60, extra_body={"structured_outputs": {"choice": ["a", "bb"]}, "min_tokens": 20}).choices[0]
    assert longer.message.content in ("a", "bb") and longer.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_required_calls_validate(client, stream, seed):
    more = dict(tools=TOOLS, tool_choice="required", max_tokens=700, seed=seed, parallel_tool_calls=False)
    if not stream:
        choice = ask(client, **more).choices[0]
        calls = [(call.function.name, call.function.arguments, call.id) for call in choice.message.tool_calls]
        assert choice.finish_reason == "tool_calls" and choice.message.content == ""
    else:
        calls, finish = {}, None
        for chunk in ask(client, stream=True, **more):
            finish = chunk.choices[0].finish_reason or finish
            for delta in chunk.choices[0].delta.tool_calls or []:
                call = calls.setdefault(delta.index, [None, "", None])
                call[0] = delta.function.name or call[0]
                call[1] += delta.function.arguments or ""
                call[2] = delta.id or call[2]
        calls = [tuple(call) for call in calls.values()]
        assert finish == "tool_calls"
    assert len(calls) == 1
    for name, arguments, call_id in calls:
        assert call_id.startswith("chatcmpl-tool-")
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call_validates(client, stream):
    more = dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "get_weather"}}, max_tokens=300, seed=3)
    if stream:
        chunks = list(ask(client, stream=True, **more))
        deltas = [delta for chunk in chunks if chunk.choices for delta in chunk.choices[0].delta.tool_calls or []]
        assert [delta.function.name for delta in deltas if delta.function.name] == ["get_weather"]
        arguments = "".join(delta.function.arguments or "" for delta in deltas)
        finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
    else:
        choice = ask(client, **more).choices[0]
        arguments, finish = choice.message.tool_calls[0].function.arguments, choice.finish_reason
    assert finish == "stop"
    jsonschema.validate(json.loads(arguments), SCHEMAS["get_weather"])


def test_tools_beside_a_response_format(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    choice = ask(client, tools=TOOLS, max_tokens=60, response_format={
        "type": "json_schema", "json_schema": {"name": "n", "schema": schema}}).choices[0]
    jsonschema.validate(json.loads(choice.message.content), schema)


def test_the_grammar_follows_reasoning(client):
    choice = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=400,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}).choices[0]
    if choice.finish_reason == "stop" and choice.message.content:
        assert json.loads(choice.message.content) in ("yes", "no")


@pytest.mark.parametrize("more, part", [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": {"a": {"not": {}}}}}}},
     "#/properties/a/not"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "file:///etc/passwd"}}}}, "#/$ref"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "look-around"),
    ({"structured_outputs": {"grammar": "root ::= nothing"}}, "nothing"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "exactly one"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [f"v{i}" for i in range(100_000)]}}}},
     "#/enum"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"description": "x" * (4 << 20)}}}}, "bytes"),
])
def test_what_cannot_be_is_a_400(demo, more, part):
    reply = demo.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, **more})
    assert reply.status_code == 400, reply.text
    assert part in reply.json()["error"]["message"]


def resident_mib(demo):
    status = pathlib.Path(f"/proc/{demo.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


def test_endless_schemas_leave_memory_flat_and_others_alone(demo):
    def ask(numbers):
        for i in numbers:
            schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": f"^(a|b{i})*c$"}}}
            reply = demo.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "structured_outputs": {"json": schema}})
            assert reply.status_code == 200, reply.text

    ask(range(400))
    full = resident_mib(demo)
    ask(range(400, 1200))
    assert resident_mib(demo) < full + 64
    assert demo.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200
    demo.wait_idle()
