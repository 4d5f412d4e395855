"""Control, information and vectors on a running server: pause while streaming, sleep, cache resets, load, pooling."""

import base64
import json
import math
import struct
import threading

import httpx
import pytest

from conftest import Server

LONG = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def dev():
    server = Server("demo", "--enable-prompt-tokens-details", "--enable-server-load-tracking",
                    "--enable-tokenizer-info-endpoint", "--enable-scale-out", "--api-key", "secret",
                    env={"VLLM_SERVER_DEV_MODE": "1", "VLLM_EXAMPLE_TOKEN": "hidden"})
    yield server
    server.stop()


KEY = {"authorization": "Bearer secret"}


class Stream:
    """A streaming completion read in the background: `first` is set with its first frame."""

    def __init__(self, server):
        self.first, self.text = threading.Event(), ""
        self.thread = threading.Thread(target=self.read, args=(server,))
        self.thread.start()
        assert self.first.wait(30)

    def read(self, server):
        with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, headers=KEY,
                          timeout=120) as response:
            for line in response.iter_lines():
                self.text += line + "\n"
                self.first.set()

    def end(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.text


def post(server, path, body=None):
    return server.post(path, body, headers=KEY)


def test_state_changes_need_the_key(dev):
    for path in ["/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/abort_requests", "/invocations",
                 "/generative_scoring", "/collective_rpc", "/scale_elastic_ep", "/inference/v1/generate"]:
        assert dev.post(path, {}).status_code == 401, path
    assert dev.post("/tokenize", {"prompt": "a"}).status_code == 200


def test_pause_while_streaming(dev):
    stream = Stream(dev)
    assert post(dev, "/pause").json() == {"status": "paused"}
    text = stream.end()
    assert '"finish_reason":"abort"' in text and text.strip().endswith("data: [DONE]")
    assert dev.get("/is_paused").json() == {"is_paused": True}
    refused = post(dev, "/v1/completions", LONG)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    assert int(refused.headers["retry-after"]) > 0
    assert post(dev, "/resume").json() == {"status": "resumed"}
    assert post(dev, "/v1/completions", {**LONG, "max_tokens": 3}).status_code == 200
    dev.wait_idle()


def test_a_frozen_stream_goes_on(dev):
    stream = Stream(dev)
    post(dev, "/pause?mode=keep")
    frozen = len(stream.text)
    assert dev.get("/health").status_code == 200
    assert len(stream.text) - frozen < 2000
    post(dev, "/resume")
    assert '"finish_reason":"length"' in stream.end()


def test_sleep_and_wake_up(dev):
    assert post(dev, "/sleep?level=1").json() == {"status": "sleeping", "level": 1}
    assert dev.get("/is_sleeping").json() == {"is_sleeping": True}
    assert dev.metric("vllm:engine_sleep_state", sleep_state="weights_offloaded") == 1
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(post(dev, "/v1/completions", {**LONG, "max_tokens": 3})))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive(), "asleep, requests wait"
    assert post(dev, "/wake_up").json() == {"status": "awake", "tags": None}
    waiting.join(30)
    assert answers[0].status_code == 200


def test_resetting_the_prefix_cache_loses_the_hits(dev):
    body = {"model": "demo", "prompt": list(range(40, 120)), "max_tokens": 1}
    cached = lambda: post(dev, "/v1/completions", body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    cached()
    assert cached() > 0
    dev.wait_idle()
    assert post(dev, "/reset_prefix_cache").json() == {"success": True}
    assert cached() == 0


def test_load_counts_what_is_in_flight(dev):
    dev.wait_idle()
    assert dev.get("/load").json() == {"server_load": 0}
    stream = Stream(dev)
    assert dev.get("/load").json() == {"server_load": 1}
    assert post(dev, "/abort_requests", {}).json() == {"status": "aborted", "aborted": 1}
    stream.end()
    dev.wait_idle()
    assert dev.get("/load").json() == {"server_load": 0}


def test_information(dev):
    info = dev.get("/server_info?config_format=json", headers=KEY).json()
    assert info["vllm_config"]["model_config"]["model"] == "demo"
    assert info["vllm_env"] == {"VLLM_SERVER_DEV_MODE": "1"}, "nothing that may be a secret"
    assert "demo" in dev.get("/server_info", headers=KEY).json()["vllm_config"]
    tokenizer = dev.get("/tokenizer_info").json()
    assert "<|im_start|>" in tokenizer["chat_template"] and tokenizer["eos_token"]
    paths = dev.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths and "/pause" in paths and "/v1/embeddings" not in paths
    assert "/v1/chat/completions" in dev.get("/docs").text


def test_rendering_then_generating_is_a_chat(dev):
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 24}
    rendered = post(dev, "/v1/chat/completions/render", chat).json()
    tokens = post(dev, "/inference/v1/generate", rendered).json()
    answer = post(dev, "/v1/chat/completions", {**chat, "return_token_ids": True}).json()
    assert tokens["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]


def test_a_batch_answers_as_each_alone(dev):
    chats = [[{"role": "user", "content": text}] for text in ["Hello!", "What is your name?"]]
    extra = {"model": "demo", "temperature": 0, "max_tokens": 24}
    batch = post(dev, "/v1/chat/completions/batch", {"messages": chats, **extra}).json()
    for choice, messages in zip(batch["choices"], chats):
        alone = post(dev, "/v1/chat/completions", {"messages": messages, **extra}).json()["choices"][0]
        assert choice["message"]["content"] == alone["message"]["content"]


@pytest.fixture(scope="module")
def pooling():
    server = Server("demo", "--runner", "pooling", "--pooler-config", json.dumps({"pooling_type": "MEAN"}))
    yield server
    server.stop()


def test_embeddings_with_the_sdk(pooling):
    client = pooling.client()
    # The SDK asks for base64 unless told otherwise.
    answer = client.embeddings.create(model="demo", input=["the cat sat", "the cat sat", "numbers: 1 2 3"])
    first, same, other = (item.embedding for item in answer.data)
    assert math.isclose(sum(x * x for x in first), 1, rel_tol=1e-3)
    assert max(abs(a - b) for a, b in zip(first, same)) < 1e-5
    assert max(abs(a - b) for a, b in zip(first, other)) > 1e-3
    floats = client.embeddings.create(model="demo", input="the cat sat", encoding_format="float").data[0].embedding
    assert max(abs(a - b) for a, b in zip(first, floats)) < 1e-5
    raw = pooling.post("/v1/embeddings", {"input": "the cat sat", "encoding_format": "base64"}).json()
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert len(struct.unpack(f"<{len(data) // 4}f", data)) == len(first)


def test_scores_rank_the_same_text_first(pooling):
    documents = ["numbers: 1 2 3", "the cat sat", "a b c"]
    answer = pooling.post("/v1/rerank", {"query": "the cat sat", "documents": documents}).json()
    assert answer["results"][0]["index"] == 1
    assert math.isclose(answer["results"][0]["relevance_score"], 1, rel_tol=1e-3)
    assert pooling.post("/v1/completions", {"prompt": "a"}).status_code == 404
