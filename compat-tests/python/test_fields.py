"""vLLM's request fields on a real model: each changes the answer as it says."""

import json
import math

import pytest

from conftest import Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello!"}]
COUNT = [{"role": "user", "content": "Count to 20"}]


def chat(server, messages=COUNT, **fields) -> dict:
    r = server.post(CHAT, {"messages": messages, "temperature": 0, **fields})
    assert r.status_code == 200, r.text
    return r.json()


def complete(server, prompt="Hello", **fields) -> dict:
    r = server.post(COMPLETIONS, {"prompt": prompt, "temperature": 0, **fields})
    assert r.status_code == 200, r.text
    return r.json()


def refusal(server, path, **fields) -> dict:
    body = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": HELLO}
    r = server.post(path, body | fields)
    assert r.status_code == 400, r.text
    return r.json()["error"]


def chunks(server, path, body) -> list[dict]:
    lines = server.post(path, {**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


# Beam search


def test_a_beam_of_one_is_greedy(demo):
    greedy, beam = chat(demo), chat(demo, use_beam_search=True)
    assert beam["choices"][0]["message"]["content"] == greedy["choices"][0]["message"]["content"]
    # vLLM's: EOS is a stop token, and not part of the answer.
    assert beam["choices"][0]["finish_reason"] == "stop" and isinstance(beam["choices"][0]["stop_reason"], int)
    assert beam["usage"]["completion_tokens"] == greedy["usage"]["completion_tokens"] - 1


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_beams_are_the_best_first_and_their_logprobs_are_the_models(tiny, length_penalty):
    _, server = tiny
    prompt = [5, 17, 300, 42]
    r = complete(server, prompt, use_beam_search=True, n=4, max_tokens=6, ignore_eos=True, logprobs=1,
                 return_token_ids=True, length_penalty=length_penalty)
    beams = r["choices"]
    assert [b["index"] for b in beams] == [0, 1, 2, 3]
    assert len({tuple(b["token_ids"]) for b in beams}) == 4 and all(b["finish_reason"] == "length" for b in beams)
    sums = [sum(b["logprobs"]["token_logprobs"]) for b in beams]
    assert sums == sorted(sums, reverse=True)
    for beam, total in zip(beams, sums):
        whole = complete(server, prompt + beam["token_ids"], max_tokens=1, prompt_logprobs=0)
        scored = whole["choices"][0]["prompt_logprobs"][len(prompt):]
        assert math.isclose(sum(next(iter(p.values()))["logprob"] for p in scored), total, abs_tol=1e-3)
    greedy = complete(server, prompt, max_tokens=6, ignore_eos=True, logprobs=0)
    assert sums[0] >= sum(greedy["choices"][0]["logprobs"]["token_logprobs"]) - 1e-4
    again = complete(server, prompt, use_beam_search=True, n=4, max_tokens=6, ignore_eos=True, return_token_ids=True,
                     length_penalty=length_penalty)
    assert [b["token_ids"] for b in again["choices"]] == [b["token_ids"] for b in beams]


def test_beams_have_bounds(demo):
    assert refusal(demo, COMPLETIONS, use_beam_search=True, stream=True)["param"] == "use_beam_search"
    assert refusal(demo, COMPLETIONS, use_beam_search=True, n=11)["param"] == "n"
    streamed = chunks(demo, CHAT, {"messages": HELLO, "use_beam_search": True, "n": 2, "temperature": 0, "max_tokens": 20})
    finished = [c["choices"][0] for c in streamed if c["choices"] and c["choices"][0]["finish_reason"]]
    assert sorted(c["index"] for c in finished) == [0, 1]
    demo.wait_idle()


# When to stop, and what is sent


def test_repetition_ends_an_answer(demo):
    (token,) = complete(demo, max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"]
    fields = {"allowed_token_ids": [token], "max_tokens": 50, "ignore_eos": True}
    rule = {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 5}
    before = demo.metric("vllm:request_success_total", finished_reason="repetition")
    choice = complete(demo, **fields, repetition_detection=rule, return_token_ids=True)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
    assert choice["token_ids"] == [token] * 5
    assert demo.metric("vllm:request_success_total", finished_reason="repetition") == before + 1
    assert complete(demo, **fields)["choices"][0]["finish_reason"] == "length"


def test_stream_interval_gathers_tokens(demo):
    body = {"messages": COUNT, "temperature": 0, "return_token_ids": True}
    sizes = lambda **f: [len(c["choices"][0]["token_ids"]) for c in chunks(demo, CHAT, body | f) if c["choices"][0].get("token_ids")]
    whole, gathered = sizes(), sizes(stream_interval=8)
    assert sum(whole) == sum(gathered) > 16 and all(size >= 8 for size in gathered[1:-1]), gathered


def test_stops_and_their_strings(demo):
    full = chat(demo)["choices"][0]["message"]["content"]
    assert " 7" in full
    cut = chat(demo, stop=[" 7"])["choices"][0]
    assert (cut["message"]["content"], cut["stop_reason"]) == (full[: full.index(" 7")], " 7")
    kept = chat(demo, stop=[" 7"], include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"] == full[: full.index(" 7") + 2]
    forced = chat(demo, messages=HELLO, ignore_eos=True, max_tokens=40)
    assert forced["usage"]["completion_tokens"] == 40 and forced["choices"][0]["finish_reason"] == "length"
    assert chat(demo, messages=HELLO, min_tokens=30, max_tokens=60)["usage"]["completion_tokens"] >= 30


def test_words_and_tokens_can_be_forbidden(demo):
    full = chat(demo)["choices"][0]["message"]["content"]
    without = chat(demo, bad_words=["7"], max_tokens=60)["choices"][0]["message"]["content"]
    assert "7" in full and "7" not in without
    ids = complete(demo, max_tokens=8, return_token_ids=True)["choices"][0]["token_ids"]
    biased = complete(demo, max_tokens=8, return_token_ids=True, logit_bias={str(ids[0]): -100})["choices"][0]["token_ids"]
    assert biased[0] != ids[0]


# Prompts


def test_prompts_keep_their_end(tiny):
    _, server = tiny
    ids = complete(server, [5, 6, 7, 8, 9], max_tokens=1, return_token_ids=True, truncate_prompt_tokens=2)
    assert ids["choices"][0]["prompt_token_ids"] == [8, 9]
    ids = complete(server, [5, 6, 7, 8, 9], max_tokens=1, return_token_ids=True, truncate_prompt_tokens=2, truncation_side="right")
    assert ids["choices"][0]["prompt_token_ids"] == [5, 6]
    assert complete(server, "word " * 5000, max_tokens=1, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 2047


def test_special_tokens_on_both_sides(demo):
    with_bos = demo.post("/tokenize", {"prompt": "Hello", "return_token_strs": True}).json()
    without = demo.post("/tokenize", {"prompt": "Hello", "add_special_tokens": False}).json()
    assert with_bos["tokens"][1:] == without["tokens"] and len(with_bos["token_strs"]) == with_bos["count"]
    assert demo.post("/detokenize", {"tokens": without["tokens"]}).json()["prompt"] == "Hello"
    ids = complete(demo, max_tokens=1, return_token_ids=True, add_special_tokens=False)["choices"][0]["prompt_token_ids"]
    assert ids == without["tokens"]
    chat_ids = lambda **f: chat(demo, messages=HELLO, max_tokens=1, return_token_ids=True, **f)["prompt_token_ids"]
    assert chat_ids(add_special_tokens=True)[1:] == chat_ids()


def test_a_message_can_be_continued(demo):
    messages = COUNT + [{"role": "assistant", "content": "1, 2, 3,"}]
    r = chat(demo, messages=messages, add_generation_prompt=False, continue_final_message=True, echo=True)
    assert r["choices"][0]["message"]["content"].startswith("1, 2, 3,") and r["prompt_logprobs"][0] is None
    assert refusal(demo, CHAT, continue_final_message=True)["type"] == "BadRequestError"


def test_templates_come_from_whom_is_trusted(demo):
    assert "--trust-request-chat-template" in refusal(demo, CHAT, chat_template="x")["message"]
    server = Server("demo", "--trust-request-chat-template", "--reasoning-effort-map", '{"high": "xhigh"}')
    try:
        template = "{{ reasoning_effort }} {{ enable_thinking }} {{ documents[0].text if documents }}"
        fields = {"chat_template": template, "return_prompt_text": True, "max_tokens": 1}
        assert chat(server, reasoning_effort="high", **fields)["prompt_text"].split() == ["xhigh", "True"]
        assert chat(server, reasoning_effort="none", **fields)["prompt_text"].split() == ["none", "False"]
        assert chat(server, documents=[{"title": "a", "text": "b"}], **fields)["prompt_text"].split() == ["b"]
        assert refusal(server, CHAT, chat_template_kwargs={"tokenize": True})["param"] == "chat_template_kwargs"
    finally:
        server.stop()


# What comes back


def test_logprobs_agree_between_endpoints_and_forms(demo):
    r = chat(demo, max_tokens=4, logprobs=True, top_logprobs=3, return_token_ids=True, prompt_logprobs=0)
    content = r["choices"][0]["logprobs"]["content"]
    assert [c["logprob"] for c in content] == [c["top_logprobs"][0]["logprob"] for c in content], "greedy takes the best"
    named = chat(demo, max_tokens=4, logprobs=True, return_tokens_as_token_ids=True)
    ids = [int(c["token"].removeprefix("token_id:")) for c in named["choices"][0]["logprobs"]["content"]]
    assert ids == r["choices"][0]["token_ids"]
    echoed = complete(demo, r["prompt_token_ids"], echo=True, max_tokens=4, logprobs=3)["choices"][0]
    tail = echoed["logprobs"]["token_logprobs"][-len(content):]
    assert all(math.isclose(a, c["logprob"], abs_tol=1e-3) for a, c in zip(tail, content))
    for token, position in zip(r["prompt_token_ids"][1:], r["prompt_logprobs"][1:]):
        assert str(token) in position
    only = complete(demo, "Hello", echo=True, max_tokens=0, logprobs=0)
    assert only["choices"][0]["text"] == "Hello" and only["usage"]["completion_tokens"] == 1


def test_usage_has_details(demo):
    messages = [{"role": "user", "content": "Tell me about " + "blue " * 60}]
    first = chat(demo, messages=messages, max_tokens=1, cache_salt="a fresh one")["usage"]
    again = chat(demo, messages=messages, max_tokens=1, cache_salt="a fresh one")["usage"]
    other = chat(demo, messages=messages, max_tokens=1, cache_salt="another")["usage"]
    details = [u["prompt_tokens_details"] for u in (first, again, other)]
    assert details[0]["cached_tokens"] == 0 and details[0]["created_cache_tokens"] > 0
    assert details[1]["cached_tokens"] > 0 and details[1]["created_cache_tokens"] < details[0]["created_cache_tokens"]
    assert details[2]["cached_tokens"] == 0
    assert "reasoning_tokens" in first["completion_tokens_details"]


def test_metrics_and_request_ids_by_flag():
    server = Server("demo", "--enable-per-request-metrics", "--enable-request-id-headers", "--stream-interval", "4")
    try:
        r = server.post(CHAT, {"messages": COUNT, "temperature": 0}, headers={"X-Request-Id": "mine", "X-Vllm-Priority": "x"})
        assert r.headers["x-request-id"] == "mine" and r.json()["id"] == "chatcmpl-mine"
        metrics = r.json()["metrics"]
        assert metrics["time_to_first_token_ms"] > 0 and metrics["tokens_per_second"] > 0 and metrics["queue_time_ms"] >= 0
        expected = metrics["generation_time_ms"] / (r.json()["usage"]["completion_tokens"] - 1)
        assert math.isclose(metrics["mean_itl_ms"], expected, rel_tol=1e-6)
        streamed = chunks(server, CHAT, {"messages": COUNT, "temperature": 0, "stream_options": {"include_usage": True}})
        assert streamed[-1]["metrics"]["generation_time_ms"] > 0 and "speculative_decoding" not in streamed[-1]["metrics"]
    finally:
        server.stop()


# Reasoning


def test_a_thinking_budget_ends_reasoning(demo):
    messages = [{"role": "user", "content": "What is 12 + 7?"}]
    free = chat(demo, messages=messages)
    used = free["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert used > 4
    for budget in (0, 4):
        r = chat(demo, messages=messages, thinking_token_budget=budget, return_token_ids=True)
        assert r["usage"]["completion_tokens_details"]["reasoning_tokens"] == budget
        assert r["choices"][0]["finish_reason"] == "stop" and r["choices"][0]["message"]["content"]
        streamed = chunks(demo, CHAT, {"messages": messages, "temperature": 0, "thinking_token_budget": budget, "return_token_ids": True})
        ids = [i for c in streamed for i in (c["choices"][0].get("token_ids") or [])]
        assert ids == r["choices"][0]["token_ids"]
    whole = chat(demo, messages=messages, thinking_token_budget=used + 50)
    assert whole["choices"][0]["message"] == free["choices"][0]["message"]
    assert refusal(demo, CHAT, thinking_token_budget=-2)["param"] == "thinking_token_budget"


# What is refused, and what has no effect


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_refusals_name_their_field(demo, path):
    for field, value in [("watermarking", True), ("return_weight_versions", True), ("logprob_token_ids", [5])]:
        assert refusal(demo, path, **{field: value})["param"] == field
    assert refusal(demo, COMPLETIONS, suffix="end")["param"] == "suffix"
    assert refusal(demo, COMPLETIONS, prompt_embeds="AAAA")["param"] == "prompt_embeds"


def test_fields_without_effect_change_nothing(demo):
    plain = chat(demo)["choices"][0]["message"]["content"]
    fields = {"user": "u", "session_id": "s", "kv_transfer_params": {"a": 1}, "vllm_xargs": {"a": [1, "b"]}, "best_of": 9,
              "return_token_offsets": True, "routed_experts_prompt_start": 2, "mm_payload": "none", "unheard_of": {}}
    assert chat(demo, **fields)["choices"][0]["message"]["content"] == plain


def test_the_sdk_sends_extensions(client):
    r = client.chat.completions.create(model="demo", messages=COUNT, temperature=0, n=2, max_tokens=20,
                                       extra_body={"use_beam_search": True, "return_token_ids": True})
    assert len(r.choices) == 2 and r.choices[0].token_ids and r.prompt_token_ids
