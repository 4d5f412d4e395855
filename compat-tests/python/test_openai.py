"""The OpenAI Python SDK against the demo model: what clients of `vllm serve` rely on."""

import json

import httpx
import openai
import pytest

HELLO = [{"role": "user", "content": "Hello!"}]
COUNT = [{"role": "user", "content": "Count to 20"}]


def test_models(demo, client):
    (model,) = client.models.list().data
    assert model.id == "demo" and model.object == "model" and model.owned_by == "vllm"
    assert model.root == "demo" and model.max_model_len > 0
    assert client.models.retrieve if hasattr(client.models, "retrieve") else True


def test_chat(client):
    r = client.chat.completions.create(model="demo", messages=HELLO, temperature=0)
    assert r.object == "chat.completion" and r.id.startswith("chatcmpl-") and r.model == "demo"
    assert r.choices[0].message.role == "assistant" and r.choices[0].message.content
    assert r.choices[0].finish_reason == "stop"
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens


def test_model_may_be_left_out(demo):
    r = demo.post("/v1/chat/completions", {"messages": HELLO, "temperature": 0})
    assert r.status_code == 200 and r.json()["model"] == "demo"


def test_stream_framing(demo):
    body = {"model": "demo", "messages": HELLO, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", demo.url + "/v1/chat/completions", json=body, timeout=60) as r:
        assert r.headers["content-type"] == "text/event-stream; charset=utf-8"
        frames = [line for line in r.iter_lines() if line]
    assert all(f.startswith("data: ") for f in frames) and frames[-1] == "data: [DONE]"
    chunks = [json.loads(f[6:]) for f in frames[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(c["object"] == "chat.completion.chunk" and c["id"] == chunks[0]["id"] for c in chunks)
    assert not any(c.get("usage") for c in chunks[:-1])


def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        c.usage.completion_tokens
        for c in client.chat.completions.create(model="demo", messages=COUNT, temperature=0, stream=True, stream_options=options)
    ]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 10


def test_reasoning_has_both_names(client):
    messages = [{"role": "user", "content": "What is 12 + 7?"}]
    m = client.chat.completions.create(model="demo", messages=messages, temperature=0).choices[0].message
    assert m.reasoning and m.reasoning == m.reasoning_content and "<think>" not in m.reasoning + m.content
    deltas = [c.choices[0].delta for c in client.chat.completions.create(model="demo", messages=messages, temperature=0, stream=True)]
    assert "".join(getattr(d, "reasoning", None) or "" for d in deltas) == m.reasoning
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == m.reasoning


def test_reasoning_can_be_hidden(demo):
    body = {"model": "demo", "messages": [{"role": "user", "content": "What is 12 + 7?"}], "temperature": 0, "include_reasoning": False}
    m = demo.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert m.get("reasoning") is None and m["content"]


def test_n_and_seed(client):
    def texts(seed):
        r = client.completions.create(model="demo", prompt="zq 7!", n=3, temperature=2, seed=seed, max_tokens=24)
        assert [c.index for c in r.choices] == [0, 1, 2]
        return [c.text for c in r.choices]

    first = texts(7)
    assert first == texts(7), "the same seed gives the same texts"
    assert len(set(first)) > 1, "choices differ"


def test_logprobs(client):
    r = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4)
    content = r.choices[0].logprobs.content
    assert len(content) == r.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the most likely"
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_stop_string_and_length(client):
    whole = client.chat.completions.create(model="demo", messages=COUNT, temperature=0).choices[0]
    assert "7" in whole.message.content
    r = client.chat.completions.create(model="demo", messages=COUNT, temperature=0, stop=["7"]).choices[0]
    assert r.finish_reason == "stop" and r.stop_reason == "7"
    assert r.message.content == whole.message.content.split("7")[0]
    r = client.chat.completions.create(model="demo", messages=COUNT, temperature=0, max_tokens=3).choices[0]
    assert r.finish_reason == "length"


def test_stop_token_ids_and_min_tokens(demo):
    base = {"model": "demo", "messages": COUNT, "temperature": 0, "return_token_ids": True}
    ids = demo.post("/v1/chat/completions", base).json()["choices"][0]["token_ids"]
    r = demo.post("/v1/chat/completions", {**base, "stop_token_ids": [ids[4]]}).json()["choices"][0]
    first = ids.index(ids[4])
    assert r["finish_reason"] == "stop" and r["stop_reason"] == ids[4] and r["token_ids"] == ids[: first + 1]
    r = demo.post("/v1/chat/completions", {**base, "min_tokens": len(ids) + 5}).json()
    assert r["usage"]["completion_tokens"] >= len(ids) + 5
    r = demo.post("/v1/chat/completions", {**base, "ignore_eos": True, "max_tokens": len(ids) + 20}).json()
    assert r["usage"]["completion_tokens"] == len(ids) + 20


def test_logit_bias_and_penalties(client, demo):
    whole = demo.post("/v1/chat/completions", {"messages": HELLO, "temperature": 0, "return_token_ids": True}).json()["choices"][0]
    first = whole["token_ids"][0]
    r = demo.post("/v1/chat/completions", {"messages": HELLO, "temperature": 0, "return_token_ids": True, "max_tokens": 1,
                                           "logit_bias": {str(first): -100}}).json()["choices"][0]
    assert r["token_ids"][0] != first
    r = client.chat.completions.create(model="demo", messages=COUNT, temperature=0, frequency_penalty=2, presence_penalty=2)
    assert r.choices[0].message.content


def test_completions(client):
    r = client.completions.create(model="demo", prompt="The capital of France is", max_tokens=8, temperature=0)
    assert r.object == "text_completion" and r.id.startswith("cmpl-") and r.choices[0].text
    both = client.completions.create(model="demo", prompt=["The capital of France is", "Hello"], max_tokens=8, temperature=0)
    assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == r.choices[0].text
    streamed = ""
    for chunk in client.completions.create(model="demo", prompt="The capital of France is", max_tokens=8, temperature=0, stream=True):
        streamed += chunk.choices[0].text
    assert streamed == r.choices[0].text


def test_completions_default_to_16_tokens(client):
    r = client.completions.create(model="demo", prompt="1 2 3", temperature=0, extra_body={"ignore_eos": True})
    assert r.usage.completion_tokens == 16 and r.choices[0].finish_reason == "length"


def test_token_ids_prompts(demo):
    ids = demo.post("/tokenize", {"prompt": "The capital of France is"}).json()["tokens"]
    one = demo.post("/v1/completions", {"prompt": ids, "max_tokens": 6, "temperature": 0}).json()["choices"][0]["text"]
    two = demo.post("/v1/completions", {"prompt": [ids, ids], "max_tokens": 6, "temperature": 0}).json()["choices"]
    assert [c["text"] for c in two] == [one, one]
    text = demo.post("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}).json()
    assert text["choices"][0]["text"] == one


def test_echo_and_completion_logprobs(demo):
    body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2}
    choice = demo.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"].startswith("The capital of France is")
    lp = choice["logprobs"]
    assert lp["token_logprobs"][0] is None and len(lp["tokens"]) == len(lp["token_logprobs"]) == len(lp["text_offset"])
    assert "".join(lp["tokens"]).endswith(choice["text"][-3:])


def test_tool_choice_none_leaves_text(client):
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "Get the weather",
              "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
    r = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "What is the weather in Quillby?"}],
                                       tools=tools, tool_choice="none", temperature=0)
    assert not r.choices[0].message.tool_calls and r.choices[0].finish_reason == "stop"


def test_prefix_cache_is_seen_in_usage(client):
    messages = [{"role": "system", "content": "You are a helpful assistant. " * 12}, *HELLO]
    a = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    b = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert b.usage.prompt_tokens_details.cached_tokens >= 16
    assert b.usage.prompt_tokens_details.cached_tokens % 16 == 0
    assert a.choices[0].message.content == b.choices[0].message.content


def test_request_id(demo):
    r = demo.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}, headers={"X-Request-Id": "abc-1"})
    assert r.json()["id"] == "chatcmpl-abc-1"


def test_unknown_fields_are_ignored(demo):
    assert demo.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1, "user": "u", "wibble": {"x": 1}}).status_code == 200


def test_numeric_strings_and_nulls(demo):
    r = demo.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": "2", "temperature": None, "stop": None})
    assert r.status_code == 200 and r.json()["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize("error, request_", [
    (openai.NotFoundError, {"model": "nope", "messages": HELLO}),
    (openai.BadRequestError, {"model": "demo", "messages": []}),
    (openai.BadRequestError, {"model": "demo", "messages": HELLO, "temperature": -1}),
])
def test_sdk_errors(client, error, request_):
    with pytest.raises(error) as e:
        client.chat.completions.create(**request_)
    assert e.value.body["message"] and e.value.body["code"] == e.value.status_code
