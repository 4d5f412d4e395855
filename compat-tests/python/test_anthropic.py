"""The Anthropic Python SDK against the demo model: what clients of `vllm serve` rely on."""

import json

import anthropic
import httpx
import pytest
from conftest import Server

HELLO = [{"role": "user", "content": "Hello!"}]
SUM = [{"role": "user", "content": "What is 12 + 7?"}]
WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
# A grammar begins after the reasoning, which the demo model may never end.
NO_THINKING = {"extra_body": {"temperature": 0, "chat_template_kwargs": {"enable_thinking": False}}}
QUESTION = [{"role": "user", "content": "What is the weather in Marlowburg?"}]


def sdk(server, **keys) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, max_retries=0, timeout=120, **(keys or {"api_key": "none"}))


@pytest.fixture(scope="module")
def claude(demo):
    return sdk(demo)


def ask(messages, temperature=0, **more):
    # This SDK no longer names the sampling parameters; vLLM's API has them.
    return {"model": "demo", "max_tokens": 400, "messages": messages, "extra_body": {"temperature": temperature}, **more}


def text(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_message(claude):
    m = claude.messages.create(**ask(HELLO))
    assert m.type == "message" and m.role == "assistant" and m.model == "demo" and m.id
    assert text(m) and m.stop_reason == "end_turn" and m.stop_sequence is None
    assert m.usage.input_tokens > 0 and m.usage.output_tokens > 0


def test_system_prompt_and_blocks_reach_the_model(claude):
    parts = [{"type": "text", "text": "Hello!"}]
    plain, blocks = (claude.messages.create(**ask(m)) for m in (HELLO, [{"role": "user", "content": parts}]))
    assert text(plain) == text(blocks)
    count = lambda **more: claude.messages.count_tokens(model="demo", messages=HELLO, **more).input_tokens
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert count(system="Be brief.") == count(system=system) > count()


def test_stream_is_the_same_message(claude):
    whole = claude.messages.create(**ask(SUM))
    with claude.messages.stream(**ask(SUM)) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == text(whole) == text(final)
    assert [b.type for b in final.content] == [b.type for b in whole.content]
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens


def test_stream_events(claude):
    events = [event for event in claude.messages.create(**ask(SUM), stream=True)]
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert events[0].message.content == [] and events[0].message.usage.output_tokens == 0
    starts = [e.index for e in events if e.type == "content_block_start"]
    assert starts == [e.index for e in events if e.type == "content_block_stop"] == list(range(len(starts)))
    deltas = [e.delta.type for e in events if e.type == "content_block_delta"]
    assert deltas.index("signature_delta") < deltas.index("text_delta"), "thinking is signed before the text"


def test_thinking(claude):
    m = claude.messages.create(**ask(SUM, max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024}))
    thought, answer = m.content
    assert thought.type == "thinking" and thought.thinking and thought.signature
    assert answer.type == "text" and "19" in answer.text and "think>" not in answer.text
    # A client sends its history back as it got it.
    turns = [*SUM, {"role": "assistant", "content": [b.model_dump() for b in m.content]}, *HELLO]
    assert text(claude.messages.create(**ask(turns)))


def test_tool_round_trip(claude):
    first = claude.messages.create(**ask(QUESTION, tools=[WEATHER]))
    assert first.stop_reason == "tool_use"
    (call,) = [b for b in first.content if b.type == "tool_use"]
    assert call.name == "get_weather" and call.input == {"city": "Marlowburg"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 21, "condition": "sunny"}'}
    turns = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(**ask(turns, tools=[WEATHER]))
    assert second.stop_reason == "end_turn" and "21" in text(second)


def test_streamed_tool_call(claude):
    with claude.messages.stream(**ask(QUESTION, tools=[WEATHER])) as stream:
        partial = "".join(e.partial_json for e in stream if e.type == "input_json")
        final = stream.get_final_message()
    (call,) = [b for b in final.content if b.type == "tool_use"]
    assert json.loads(partial) == call.input == {"city": "Marlowburg"} and final.stop_reason == "tool_use"


def test_tool_choice_none_and_empty_tools(claude):
    m = claude.messages.create(**ask(QUESTION, tools=[WEATHER], tool_choice={"type": "none"}))
    assert m.stop_reason == "end_turn" and not [b for b in m.content if b.type == "tool_use"]
    assert claude.messages.create(**ask(HELLO, tools=[])).content


@pytest.mark.parametrize("choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_is_forced(claude, choice):
    asked = ask(QUESTION, tools=[WEATHER], tool_choice=choice, **NO_THINKING)
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    for m in (claude.messages.create(**asked), final):
        (call,) = [b for b in m.content if b.type == "tool_use"]
        assert call.name == "get_weather" and list(call.input) == ["city"] and m.stop_reason == "tool_use"


def test_output_follows_a_schema(claude):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    m = claude.messages.create(**ask(HELLO, output_config={"format": {"type": "json_schema", "schema": schema}}, **NO_THINKING))
    assert list(json.loads(text(m))) == ["n"]


def test_stop_reasons(claude):
    count = [{"role": "user", "content": "Count to 20"}]
    m = claude.messages.create(**ask(count, stop_sequences=["7"]))
    assert (m.stop_reason, m.stop_sequence) == ("stop_sequence", "7") and "7" not in text(m)
    m = claude.messages.create(**ask(count, max_tokens=3))
    assert (m.stop_reason, m.stop_sequence, m.usage.output_tokens) == ("max_tokens", None, 3)


def test_count_tokens_is_what_a_message_costs(claude):
    more = {"tools": [WEATHER], "system": "Be brief."}
    counted = claude.messages.count_tokens(model="demo", messages=QUESTION, **more)
    usage = claude.messages.create(**ask(QUESTION, **more)).usage
    cached = usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert counted.input_tokens == usage.input_tokens + cached


def test_cached_tokens(claude):
    long = "You are a helpful assistant. " * 12
    claude.messages.create(**ask(HELLO, system=long))
    usage = claude.messages.create(**ask(HELLO, system=long)).usage
    assert usage.cache_read_input_tokens >= 16


@pytest.mark.parametrize("error, kind, change", [
    (anthropic.NotFoundError, "not_found_error", {"model": "nope"}),
    (anthropic.BadRequestError, "invalid_request_error", {"extra_body": {"temperature": -1}}),
    (anthropic.BadRequestError, "invalid_request_error", {"messages": []}),
    (anthropic.BadRequestError, "invalid_request_error",
     {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]}]}),
])
def test_errors(claude, error, kind, change):
    for stream in (False, True):
        with pytest.raises(error) as e:
            claude.messages.create(**{**ask(HELLO), **change}, stream=stream)
        assert e.value.body["type"] == "error" and e.value.body["error"]["type"] == kind and e.value.body["error"]["message"]


def test_body_errors_have_openais_envelope(demo):
    r = demo.post("/v1/messages", {"model": "demo", "messages": HELLO})
    assert r.status_code == 400 and r.json()["error"]["param"] == "body.max_tokens"


def test_an_aborted_stream_is_freed(demo, claude):
    with claude.messages.stream(**ask([{"role": "user", "content": "Count to 100"}], max_tokens=1000)) as stream:
        next(iter(stream))
    demo.wait_idle()


def test_keys():
    server = Server("demo", "--api-key", "secret", "--anthropic-disabled-thinking-effort", "low")
    try:
        for keys in ({"api_key": "secret"}, {"auth_token": "secret"}):
            assert sdk(server, **keys).messages.create(**ask(HELLO, thinking={"type": "disabled"})).content
        with pytest.raises(anthropic.AuthenticationError):
            sdk(server, api_key="wrong").messages.create(**ask(HELLO))
        assert httpx.post(server.url + "/v1/messages/count_tokens", json={}).status_code == 401
    finally:
        server.stop()
