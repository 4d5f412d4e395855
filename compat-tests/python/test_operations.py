"""Starting, stopping, keys, metrics, flags: what operators see."""

import json
import os
import shutil
import signal
import struct
import threading
import time

import httpx
import pytest
from conftest import GOLDENS, Server, run_to_exit

HELLO = [{"role": "user", "content": "Hello!"}]


def test_version():
    r = run_to_exit("--version")
    assert r.returncode == 0 and r.stdout.strip()


@pytest.mark.parametrize("args, code, says", [
    (["serve", "demo", "--no-such-flag"], 2, "--no-such-flag"),
    (["serve", "demo", "--port", "many"], 2, "--port"),
    (["serve", "demo", "--tensor-parallel-size", "4", "--device", "cpu"], 1, "tensor"),
    (["serve", "demo", "--tool-call-parser", "nope"], 1, "nope"),
    (["serve", "demo", "--reasoning-parser", "nope"], 1, "nope"),
    (["serve", "demo", "--enable-auto-tool-choice"], 1, "--tool-call-parser"),
    (["serve", "demo", "--max-model-len", "100M"], 1, "max"),
    (["serve", "demo", "--quantization", "awq"], 1, "quantization"),
    (["serve", "demo", "--headless"], 1, "headless"),
    (["serve", "/no/such/directory"], 1, "/no/such/directory"),
])
def test_refused_at_start(args, code, says):
    # The address is bound before the model is read: port 8000 may be another's.
    r = run_to_exit(*args, *([] if "--port" in args else ["--port", "0"]))
    assert r.returncode == code, r.stderr
    assert says in r.stderr + r.stdout and "panicked" not in r.stderr


def test_device_cuda_without_a_driver_is_an_error():
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    r = run_to_exit("serve", "demo", "--device", "cuda", "--port", "0")
    assert r.returncode == 1 and "cuda" in (r.stderr + r.stdout).lower() and "panicked" not in r.stderr


def broken(tmp_path, change) -> str:
    directory = tmp_path / "model"
    shutil.copytree(GOLDENS / "tiny-moe" / "checkpoint", directory)
    change(directory)
    return str(directory)


def edit_config(**fields):
    def change(d):
        config = json.loads((d / "config.json").read_text())
        config.update(fields)
        (d / "config.json").write_text(json.dumps(config))
    return change


def truncate(d):
    data = (d / "model.safetensors").read_bytes()
    (d / "model.safetensors").write_bytes(data[: len(data) // 2])


def huge_header(d):
    data = (d / "model.safetensors").read_bytes()
    (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + data[8:])


CHECKPOINTS = {
    "truncated weights": (truncate, "model.safetensors"),
    "header of 2^63": (huge_header, "model.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
    "absurd hidden size": (edit_config(hidden_size=2**40), "hidden_size"),
    "absurd layers": (edit_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "more layers than tensors": (edit_config(num_hidden_layers=7, layer_types=["conv", "conv", "full_attention", "conv", "full_attention", "conv", "conv"]), "layers.6"),
    "fewer layers than tensors": (edit_config(num_hidden_layers=5, layer_types=["conv", "conv", "full_attention", "conv", "full_attention"]), "layers.5"),
    "other vocabulary": (edit_config(vocab_size=4096), "embed_tokens"),
    "unknown architecture": (edit_config(architectures=["GptForCausalLM"]), "GptForCausalLM"),
    "broken template": (lambda d: (d / "chat_template.jinja").write_text("{% for %}"), "template"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_malformed_checkpoints(tmp_path, name):
    change, says = CHECKPOINTS[name]
    r = run_to_exit("serve", broken(tmp_path, change), "--port", "0")
    assert r.returncode == 1, (r.returncode, r.stderr[-2000:])
    assert says in r.stderr + r.stdout and "panicked" not in r.stderr + r.stdout


def test_dummy_weights_need_no_weight_files(tmp_path):
    directory = broken(tmp_path, lambda d: (d / "model.safetensors").unlink())
    server = Server(directory, "--load-format", "dummy", "--served-model-name", "a", "b")
    try:
        assert [m["id"] for m in server.get("/v1/models").json()["data"]] == ["a", "b"]
        r = server.post("/v1/completions", {"model": "b", "prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True})
        assert r.json()["usage"]["completion_tokens"] == 5
    finally:
        server.stop()


def test_api_key():
    server = Server("demo", "--api-key", "k1", "k2")
    try:
        assert server.get("/health").status_code == 200 and server.get("/metrics").status_code == 200
        for headers in [{}, {"Authorization": "Bearer no"}, {"Authorization": "k1"}, {"Authorization": "Bearer k1k2"}]:
            r = server.get("/v1/models", headers=headers)
            assert r.status_code == 401 and r.json() == {"error": "Unauthorized"}
        for headers in [{"Authorization": "Bearer k1"}, {"Authorization": "bearer k2"}]:
            assert server.get("/v1/models", headers=headers).status_code == 200
        assert server.client(api_key="k2").chat.completions.create(model="demo", messages=HELLO).choices
    finally:
        server.stop()


def test_config_file_and_environment(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: demo\nserved-model-name: from-file\nmax-model-len: 1k\n")
    server = Server("--config", str(config), "--served_model_name", "from-flag", env={"VLLM_API_KEY": "secret"})
    try:
        r = server.get("/v1/models", headers={"Authorization": "Bearer secret"})
        (model,) = r.json()["data"]
        assert model["id"] == "from-flag" and model["max_model_len"] == 1000
        assert server.get("/v1/models").status_code == 401
    finally:
        server.stop()


def test_start_says_what_vllm_says():
    server = Server("demo")
    try:
        log = server.logs()
        assert "Maximum concurrency for" in log and "KV cache size" in log and "Application startup complete" in log
        assert "CPU" in log
    finally:
        server.stop()


def test_sigterm_ends_an_idle_server():
    server = Server("demo")
    server.signal()
    assert server.wait(10) == 0


def test_sigterm_drains():
    server = Server("demo", "--shutdown-timeout", "300")
    try:
        result = {}

        def ask():
            result["r"] = server.post("/v1/completions", {"prompt": "x", "max_tokens": 2000, "ignore_eos": True})

        thread = threading.Thread(target=ask)
        thread.start()
        while server.metric("vllm:num_requests_running") < 1:
            assert thread.is_alive(), "the request ended before it was seen running"
            time.sleep(0.01)
        server.signal()
        thread.join()
        assert result["r"].json()["usage"]["completion_tokens"] == 2000
        assert server.wait(10) == 0
    finally:
        server.stop()


def test_second_signal_aborts_and_streams_end():
    server = Server("demo", "--shutdown-timeout", "60")
    try:
        body = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=30) as r:
            lines = r.iter_lines()
            next(lines)
            server.signal()
            time.sleep(0.3)
            server.signal(signal.SIGINT)
            try:
                for _ in lines:
                    pass
            except httpx.TransportError:
                pass  # ended, which is the point
        server.wait(10)
    finally:
        server.stop()


def test_metrics(demo):
    demo.wait_idle()
    before = {n: demo.metric(n) for n in ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
                                          "vllm:time_to_first_token_seconds_count", "vllm:e2e_request_latency_seconds_count"]}
    usage = demo.post("/v1/chat/completions", {"messages": HELLO, "temperature": 0}).json()["usage"]
    demo.wait_idle()
    rise = {n: demo.metric(n) - v for n, v in before.items()}
    assert rise["vllm:generation_tokens_total"] == usage["completion_tokens"]
    assert rise["vllm:prompt_tokens_total"] == usage["prompt_tokens"]
    assert rise["vllm:request_success_total"] == 1
    assert rise["vllm:time_to_first_token_seconds_count"] == rise["vllm:e2e_request_latency_seconds_count"] == 1
    assert demo.get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_queue_limit_is_503():
    server = Server("demo", "--max-num-seqs", "1", "--max-num-queued-reqs", "1")
    try:
        statuses = []

        def ask():
            r = server.post("/v1/completions", {"prompt": "x", "max_tokens": 400, "ignore_eos": True})
            statuses.append((r.status_code, r.headers.get("retry-after")))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert sorted({s for s, _ in statuses}) == [200, 503]
        assert all(retry for s, retry in statuses if s == 503)
        server.wait_idle()
    finally:
        server.stop()


def test_preemption_changes_no_text(tmp_path):
    """So few KV blocks that any two sequences at once must be preempted and recomputed."""
    small = Server("demo", "--num-gpu-blocks-override", "40", "--max-model-len", "512", "--max-num-seqs", "8")
    try:
        body = {"prompt": "Count to 100", "max_tokens": 450, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        alone = small.post("/v1/completions", body).json()["choices"][0]["token_ids"]
        results = []
        threads = [threading.Thread(target=lambda: results.append(small.post("/v1/completions", body).json()["choices"][0]["token_ids"])) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert results == [alone] * 8
        assert small.metric("vllm:num_preemptions_total") > 0
        small.wait_idle()
    finally:
        small.stop()
