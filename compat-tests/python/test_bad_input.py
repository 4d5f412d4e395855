"""Bad input: a 4xx that names the parameter, the server alive, a parallel request unharmed."""

import json
import threading
import time

import httpx
import pytest
from conftest import Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello!"}]


def chat(**fields) -> dict:
    return {"model": "demo", "messages": HELLO, "max_tokens": 2, **fields}


def completion(**fields) -> dict:
    return {"model": "demo", "prompt": "Hello", "max_tokens": 2, **fields}


@pytest.fixture(scope="module", autouse=True)
def victim(demo):
    """An honest client that never stops asking while the bad ones come."""
    answers, failures, stop = set(), [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                r = demo.post(CHAT, {"model": "demo", "messages": HELLO, "temperature": 0})
                answers.add(r.json()["choices"][0]["message"]["content"]) if r.status_code == 200 else failures.append(r.text)
            except Exception as e:  # any failure of the honest client is a finding
                failures.append(repr(e))
            time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert not failures and len(answers) == 1
    assert demo.get("/health").status_code == 200
    demo.wait_idle()


def refused(r: httpx.Response, status: int = 400, param: str | None = None) -> dict:
    assert r.status_code == status, f"{r.status_code}: {r.text[:400]}"
    error = r.json()["error"]
    assert error["code"] == status and error["message"] and error["type"]
    assert "/root" not in error["message"] and "0x" not in error["message"]
    if param is not None:
        assert param in (error["param"] or "") or param in error["message"], error
    return error


RAW = {
    "empty": b"",
    "not json": b"hello",
    "truncated": b'{"model": "demo", "messages": [{"role": "user"',
    "array": b"[]",
    "string": b'"x"',
    "null": b"null",
    "nan": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "overflow": b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    "invalid utf-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "utf-16": '{"messages": []}'.encode("utf-16"),
    "deep": b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nul bytes": b"\x00\x00\x00\x00",
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", RAW)
def test_raw_bodies(demo, path, name):
    if name == "overflow" and "tokenize" in path:
        pytest.skip("valid JSON to Python, in a field that this route does not have")
    r = demo.post(path, content=RAW[name], headers={"content-type": "application/json"})
    refused(r)


def test_content_type(demo):
    refused(demo.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"}))
    r = demo.post(CHAT, content=json.dumps(chat()), headers={"content-type": "application/json; charset=utf-8"})
    assert r.status_code == 200


BAD_FIELDS = [
    ("temperature", -0.1), ("temperature", "hot"), ("temperature", [1]), ("top_p", 0), ("top_p", 1.5), ("top_k", -2),
    ("min_p", 2), ("min_p", -1), ("repetition_penalty", 0), ("repetition_penalty", -1), ("presence_penalty", 3), ("frequency_penalty", -3),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "many"), ("max_tokens", 10**30), ("max_tokens", 10**9),
    ("n", 0), ("n", -1), ("n", 10**9), ("n", "x"), ("seed", 2**65), ("seed", "x"),
    ("logprobs", 10**9), ("logit_bias", {"999999999": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", [1]),
    ("stop_token_ids", ["x"]), ("stop", [""]), ("stop", 5), ("min_tokens", -1), ("min_tokens", 100),
    ("allowed_token_ids", [10**9]), ("allowed_token_ids", []), ("priority", "x"), ("stream", "perhaps"), ("stream_options", {"include_usage": True}),
    ("truncate_prompt_tokens", -5), ("prompt_logprobs", -3), ("prompt_logprobs", 10**6), ("cache_salt", "a/b"), ("cache_salt", "x" * 500),
]


@pytest.mark.parametrize("field, value", BAD_FIELDS, ids=[f"{f}={str(v)[:20]}" for f, v in BAD_FIELDS])
def test_fields(demo, field, value):
    if field != "logprobs":  # a bool on chat
        refused(demo.post(CHAT, chat(**{field: value})), param=field)
    refused(demo.post(COMPLETIONS, completion(**{field: value})), param=field)


def test_top_logprobs(demo):
    refused(demo.post(CHAT, chat(logprobs=True, top_logprobs=10**6)), param="logprobs")
    refused(demo.post(CHAT, chat(top_logprobs=3)), param="top_logprobs")


def test_sampling_many_greedy_choices(demo):
    refused(demo.post(CHAT, chat(n=2, temperature=0)))


NOT_YET = [
    ("watermarking", True), ("logprob_token_ids", [1]),
]


@pytest.mark.parametrize("field, value", NOT_YET, ids=[f for f, _ in NOT_YET])
def test_what_is_not_honoured_is_refused(demo, field, value):
    refused(demo.post(CHAT, chat(**{field: value})), param=field)


MESSAGES = {
    "none": None, "a string": "hi", "empty": [], "of strings": ["hi"], "without role": [{"content": "x"}],
    "content number": [{"role": "user", "content": 5}], "unknown part": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}],
    "image for a text model": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(demo, name):
    refused(demo.post(CHAT, chat(messages=MESSAGES[name])))


PROMPTS = {
    "missing": None, "empty string": "", "empty list": [], "empty ids": [[]], "ids out of range": [10**9], "negative ids": [-1],
    "float ids": [1.5], "mixed": ["a", 1], "too long": "hello " * 200_000, "too many ids": [5] * 200_000, "too many prompts": ["a"] * 5000,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(demo, name):
    refused(demo.post(COMPLETIONS, completion(prompt=PROMPTS[name])))


def test_prompt_longer_than_the_context(demo):
    limit = demo.get("/v1/models").json()["data"][0]["max_model_len"]
    e = refused(demo.post(COMPLETIONS, completion(prompt=[5] * (limit + 1))), param="input_tokens")
    assert f"maximum context length is {limit} tokens" in e["message"]
    refused(demo.post(COMPLETIONS, completion(prompt=[5] * limit)), param="max_tokens")


def test_the_longest_prompt_has_one_answer_token():
    server = Server("demo", "--max-model-len", "512")  # the whole context takes minutes in a debug build
    try:
        refused(server.post(COMPLETIONS, completion(prompt=[5] * 512)), param="max_tokens")
        r = server.post(COMPLETIONS, completion(prompt=[5] * 511, max_tokens=100))
        assert r.status_code == 200 and r.json()["usage"]["completion_tokens"] == 1
    finally:
        server.stop()


def test_null_bytes_and_specials_in_text(demo):
    for text in ["a\x00b", "<|im_end|><|im_start|>system", "<|tool_call_start|>[", "\u202e\ufeff"]:
        assert demo.post(CHAT, chat(messages=[{"role": "user", "content": text}])).status_code == 200


def test_unknown_model(demo):
    for path, body in [(CHAT, chat(model="gpt-9")), (COMPLETIONS, completion(model="gpt-9"))]:
        assert "demo" in refused(demo.post(path, body), 404, "model")["message"]


def test_templates_from_requests_are_not_trusted(demo):
    refused(demo.post(CHAT, chat(chat_template="{% for i in range(1000000000) %}x{% endfor %}")), param="--trust-request-chat-template")


def test_template_arguments_cannot_replace_reserved_names(demo):
    r = demo.post(CHAT, chat(chat_template_kwargs={"tokenize": True, "messages": [], "chat_template": "x"}))
    assert r.status_code in (200, 400)
    if r.status_code == 200:
        assert r.json()["usage"]["prompt_tokens"] > 5


def test_tools(demo):
    refused(demo.post(CHAT, chat(tools=[])))
    refused(demo.post(CHAT, chat(tools=[{"type": "function"}])))
    refused(demo.post(CHAT, chat(tools="x")))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    refused(demo.post(CHAT, chat(tools=[tool], tool_choice={"type": "function", "function": {"name": "g"}})))


def test_forced_calls_of_odd_tools(demo):
    def tool(name, parameters):
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    empty = {"type": "object", "properties": {}}
    refused(demo.post(CHAT, chat(tool_choice="required")))
    refused(demo.post(CHAT, chat(tools=[tool("f", {"type": "objekt"})], tool_choice="required")))
    refused(demo.post(CHAT, chat(tools=[tool(f"f{i}", empty) for i in range(10_000)], tool_choice="required")))
    for name in ['a"b', "a\nb", "a.b", "<|im_end|>", "é" * 100]:
        r = demo.post(CHAT, chat(tools=[tool(name, empty)] * 2, tool_choice="required"))
        assert r.status_code == 200, r.text


def test_paths_and_methods(demo):
    assert demo.get("/v1/nothing").json() == {"detail": "Not Found"}
    r = demo.get(CHAT)
    assert r.status_code == 405 and r.json() == {"detail": "Method Not Allowed"}


def test_body_limit(demo):
    r = demo.post(CHAT, content=b'{"messages": "' + b"x" * (40 << 20) + b'"}', headers={"content-type": "application/json"})
    assert r.status_code == 413


def test_headers(demo):
    try:
        r = demo.get("/health", headers={f"x-{i}": "y" for i in range(10_000)})
        assert 400 <= r.status_code < 500
    except httpx.TransportError:
        pass  # the connection may be closed instead
    assert demo.get("/health").status_code == 200


def test_disconnect_frees_everything(demo):
    for _ in range(5):
        body = chat(max_tokens=4000, ignore_eos=True, stream=True)
        with httpx.stream("POST", demo.url + CHAT, json=body, timeout=60) as r:
            next(r.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(demo.url + CHAT, json=chat(max_tokens=7000, ignore_eos=True, n=2, temperature=1), timeout=0.3)
    end = time.monotonic() + 20
    while demo.metric("vllm:num_requests_running") > 1:  # the victim may run
        assert time.monotonic() < end, "an abandoned request still runs"
        time.sleep(0.05)
