"""The golden checkpoints over HTTP: Hugging Face's greedy tokens and log-probabilities, in float32."""

import concurrent.futures

import pytest
from conftest import golden


@pytest.mark.parametrize("prompt", ["p1", "p7", "p130", "p513"])
def test_greedy_tokens(tiny, prompt):
    name, server = tiny
    g = golden(name)
    r = server.post("/v1/completions", {
        "model": "tiny", "prompt": g["prompts"][prompt], "max_tokens": 64, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "logprobs": 1,
    })
    assert r.status_code == 200, r.text
    choice, want = r.json()["choices"][0], g["per_prompt"][prompt]["fp32"]
    assert choice["token_ids"] == want["greedy"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(want["greedy_logprobs"], abs=1e-3)


def test_prompt_logprobs(tiny):
    name, server = tiny
    g = golden(name)
    r = server.post("/v1/completions", {
        "model": "tiny", "prompt": g["prompts"]["p130"], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0,
    })
    assert r.status_code == 200, r.text
    entries = r.json()["choices"][0]["prompt_logprobs"]
    ids, want = g["prompts"]["p130"], g["per_prompt"]["p130"]["fp32"]["next_token_logprob"]
    assert entries[0] is None and len(entries) == len(ids)
    for token, entry, logprob in zip(ids[1:], entries[1:], want):
        assert entry[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-3)


def test_same_text_with_and_without_neighbours(tiny):
    """64 mixed requests at once give the greedy tokens that each gives alone, prefix hits included."""
    name, server = tiny
    g = golden(name)
    long = g["prompts"]["p513"]
    prompts = [long[: 5 + 7 * i] for i in range(40)] + [long[i : i + 64] for i in range(24)]

    def tokens(ids):
        body = {"model": "tiny", "prompt": ids, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return server.post("/v1/completions", body).json()["choices"][0]["token_ids"]

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(tokens, prompts))
    hits = server.metric("vllm:prefix_cache_hits_total")
    alone = [tokens(p) for p in prompts]
    assert together == alone
    assert server.metric("vllm:prefix_cache_hits_total") > hits, "the second pass must hit the prefix cache"
    server.wait_idle()


def test_tokenize_round_trip(tiny):
    name, server = tiny
    for text in ["Hello, world!", "Grüße aus Köln 🌍", "1234567 x\n\n  y"]:
        ids = server.post("/tokenize", {"model": "tiny", "prompt": text, "add_special_tokens": False}).json()
        assert ids["count"] == len(ids["tokens"]) > 0
        assert ids["max_model_len"] == 2048
        assert server.post("/detokenize", {"model": "tiny", "tokens": ids["tokens"]}).json()["prompt"] == text
