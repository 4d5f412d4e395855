"""The Responses API with the OpenAI Python SDK against the demo model."""

import json
import time

import httpx
import openai
import pytest
from conftest import Server

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
# A grammar begins after the reasoning, which the demo model may never end.
NO_THINKING = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, "max_output_tokens": 400}
QUESTION = "What is the weather in Marlowburg?"


@pytest.fixture(scope="module")
def store():
    server = Server("demo", env={"VLLM_ENABLE_RESPONSES_API_STORE": "1"})
    yield server
    server.stop()


@pytest.fixture(scope="module")
def storing(store):
    return store.client()


def ask(input, **more):
    return {"model": "demo", "input": input, "temperature": 0, **more}


def kinds(response):
    return [item.type for item in response.output]


def test_text(client):
    r = client.responses.create(**ask("Hello!"))
    assert r.object == "response" and r.id.startswith("resp_") and r.status == "completed" and r.model == "demo"
    assert r.output_text and r.error is None and r.tool_choice == "none"
    assert r.usage.total_tokens == r.usage.input_tokens + r.usage.output_tokens > 0
    chat = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hello!"}], temperature=0)
    assert r.output_text == chat.choices[0].message.content and r.usage.input_tokens == chat.usage.prompt_tokens


def test_items_and_instructions(client):
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]}]
    plain = client.responses.create(**ask("Hello!"))
    assert client.responses.create(**ask(items)).output_text == plain.output_text
    brief = client.responses.create(**ask("Hello!", instructions="Be brief."))
    assert brief.instructions == "Be brief." and brief.usage.input_tokens > plain.usage.input_tokens


def test_reasoning(client):
    r = client.responses.create(**ask("What is 12 + 7?"))
    assert kinds(r) == ["reasoning", "message"] and r.usage.output_tokens_details.reasoning_tokens > 0
    assert r.output[0].content[0].text and "19" in r.output_text and "think>" not in r.output_text
    # Items go back as they came.
    again = client.responses.create(**ask([{"role": "user", "content": "What is 12 + 7?"}, *r.output, {"role": "user", "content": "Hello!"}]))
    assert again.output_text


def test_stream_is_the_same_response(client):
    whole = client.responses.create(**ask("What is 12 + 7?"))
    events = list(client.responses.create(**ask("What is 12 + 7?"), stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"] and events[-1].type == "response.completed"
    final = events[-1].response
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    thought = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert text == final.output_text == whole.output_text
    assert thought == final.output[0].content[0].text == whole.output[0].content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_stream_helper(client):
    with client.responses.stream(**ask(QUESTION, tools=[WEATHER])) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    (call,) = [item for item in final.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Marlowburg"} and call.status == "completed"


def test_tool_round_trip(client):
    first = client.responses.create(**ask(QUESTION, tools=[WEATHER]))
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Marlowburg"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 21, "condition": "sunny"}'}
    second = client.responses.create(**ask([{"role": "user", "content": QUESTION}, *first.output, result], tools=[WEATHER]))
    assert "21" in second.output_text and "function_call" not in kinds(second)


def test_tool_choice_none(client):
    r = client.responses.create(**ask(QUESTION, tools=[WEATHER], tool_choice="none"))
    assert "function_call" not in kinds(r) and r.tool_choice == "none" and r.tools[0].name == "get_weather"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"},
                                    {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}])
def test_a_tool_is_forced(client, choice):
    whole = client.responses.create(**ask(QUESTION, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, **NO_THINKING))
    *_, last = client.responses.create(**ask(QUESTION, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, **NO_THINKING), stream=True)
    for r in (whole, last.response):
        (call,) = [item for item in r.output if item.type == "function_call"]
        assert call.name == "get_weather" and list(json.loads(call.arguments)) == ["city"]


def test_output_follows_a_schema(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    format = {"type": "json_schema", "name": "number", "schema": schema, "strict": True}
    r = client.responses.create(**ask("Hello!", text={"format": format}, **NO_THINKING))
    assert list(json.loads(r.output_text)) == ["n"] and r.text.format.name == "number"
    json.loads(client.responses.create(**ask("Hello!", text={"format": {"type": "json_object"}}, **NO_THINKING)).output_text)


def test_cut(client):
    r = client.responses.create(**ask("Count to 20", max_output_tokens=3))
    assert r.status == "incomplete" and r.incomplete_details.reason == "max_output_tokens"
    assert r.usage.output_tokens == 3 and r.max_output_tokens == 3


def test_logprobs(client):
    r = client.responses.create(**ask("Hello!", include=["message.output_text.logprobs"], top_logprobs=2))
    logprobs = r.output[-1].content[0].logprobs
    assert len(logprobs) == r.usage.output_tokens and all(len(p.top_logprobs) == 2 for p in logprobs)


def test_what_was_asked_is_repeated(client):
    r = client.responses.create(**ask("Hello!", metadata={"a": "b"}, user="u", truncation="auto", reasoning={"effort": "low"}, parallel_tool_calls=False))
    assert r.metadata == {"a": "b"} and r.user == "u" and r.truncation == "auto" and r.reasoning.effort == "low"
    assert r.parallel_tool_calls is False and r.temperature == 0


@pytest.mark.parametrize("error, param, change", [
    (openai.NotFoundError, "model", {"model": "nope"}),
    (openai.BadRequestError, "temperature", {"temperature": -1}),
    (openai.BadRequestError, "max_output_tokens", {"max_output_tokens": 0}),
    (openai.BadRequestError, "background", {"background": True}),
    (openai.NotFoundError, "response_id", {"previous_response_id": "resp_none"}),
    (openai.BadRequestError, "tools.0.type", {"tools": [{"type": "web_search"}]}),
    (openai.BadRequestError, "tool_choice", {"tool_choice": "required"}),
    (openai.BadRequestError, "input.0.type", {"input": [{"type": "item_reference", "id": "x"}]}),
])
def test_errors(client, error, param, change):
    for stream in (False, True):
        with pytest.raises(error) as e:
            client.responses.create(**{**ask("x"), **change}, stream=stream)
        assert e.value.param == param and e.value.body["message"]


def test_previous_response(storing):
    first = storing.responses.create(**ask(QUESTION, tools=[WEATHER], instructions="Use tools."))
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert storing.responses.retrieve(first.id).to_dict() == first.to_dict()
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 21, "condition": "sunny"}'}
    second = storing.responses.create(**ask([result], tools=[WEATHER], previous_response_id=first.id))
    assert "21" in second.output_text and second.previous_response_id == first.id
    third = storing.responses.create(**ask("Hello!", tools=[WEATHER], previous_response_id=second.id))
    assert third.usage.input_tokens > second.usage.input_tokens


def test_store_false(storing):
    r = storing.responses.create(**ask("Hello!", store=False))
    with pytest.raises(openai.NotFoundError):
        storing.responses.retrieve(r.id)


def test_background(storing):
    r = storing.responses.create(**ask("Count to 20", background=True))
    assert r.status == "queued" and r.background
    end = time.monotonic() + 60
    while r.status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.02)
        r = storing.responses.retrieve(r.id)
    assert r.status == "completed" and r.output_text


def test_background_stream_is_resumed(storing):
    stream = storing.responses.create(**ask("Count to 20", background=True, stream=True))
    first = next(iter(stream))
    stream.close()
    rest = list(storing.responses.retrieve(first.response.id, stream=True, starting_after=first.sequence_number))
    assert [e.sequence_number for e in rest] == list(range(1, len(rest) + 1)) and rest[-1].type == "response.completed"


def test_cancel(store, storing):
    r = storing.responses.create(**ask("Count to 100", background=True, extra_body={"ignore_eos": True}))
    assert storing.responses.cancel(r.id).status == "cancelled"
    store.wait_idle()
    assert storing.responses.retrieve(r.id).status == "cancelled"
    for id in (r.id, storing.responses.create(**ask("Hello!")).id):
        with pytest.raises(openai.BadRequestError):
            storing.responses.cancel(id)
    with pytest.raises(openai.NotFoundError):
        storing.responses.cancel("resp_none")


def test_an_aborted_stream_is_freed(demo):
    body = ask("Count to 100", stream=True, ignore_eos=True)
    with httpx.stream("POST", demo.url + "/v1/responses", json=body, timeout=60) as r:
        assert r.headers["content-type"] == "text/event-stream; charset=utf-8"
        next(r.iter_lines())
    demo.wait_idle()
