"""The binary beside `serve`: clients, batches, dry runs, benchmarks."""

import hashlib
import http.server
import json
import pathlib
import subprocess
import threading

import pytest

from conftest import GOLDENS, RVLLM, Server, run_to_exit


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The program


def test_help_and_version():
    top = run_to_exit("--help")
    assert top.returncode == 0
    for command in ["serve", "chat", "complete", "bench latency", "bench startup", "run-batch", "collect-env"]:
        assert command in top.stdout
    assert run_to_exit("--version").stdout.strip().count(".") == 2
    assert run_to_exit().stdout == top.stdout
    assert "--system-prompt" in run_to_exit("chat", "--help").stdout
    assert "--random-input-len" in run_to_exit("bench", "serve", "--help").stdout


@pytest.mark.parametrize("arguments, code, message", [
    (["frobnicate"], 2, "invalid choice: 'frobnicate'"),
    (["bench"], 2, "bench_type"),
    (["chat", "--nothing"], 2, "unrecognized arguments: --nothing"),
    (["bench", "serve", "--num-prompts", "x"], 2, "invalid int value: 'x'"),
    (["bench", "serve", "--plot-timeline"], 1, "--save-detailed"),
    (["run-batch", "--model", "demo"], 2, "-i/--input-file"),
    (["serve", "demo", "--enable-lora"], 1, "LoRA"),
    (["serve"], 1, "no model is given"),
])
def test_exit_codes(arguments, code, message):
    result = run_to_exit(*arguments)
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert "panicked" not in result.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{RVLLM} serve --help=all | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30)
    assert result.stdout.startswith("usage: ") and result.stderr == ""
    bench = "bench startup --model demo --device cpu --num-iters-cold 0 --num-iters-warmup 0 --num-iters-warm 1"
    result = subprocess.run(f"{RVLLM} {bench} | head -1", shell=True, capture_output=True, text=True, timeout=60)
    assert result.stdout == "Measuring cold startup time...\n" and "panicked" not in result.stderr


def test_collect_env_hides_secrets():
    result = run_to_exit("collect-env", env={"HF_TOKEN": "hf_secret", "VLLM_LOGGING_LEVEL": "DEBUG"})
    assert result.returncode == 0
    assert "hf_secret" not in result.stdout
    for part in ["rvllm version", "Model name", "Libc version", "VLLM_LOGGING_LEVEL", "HF_TOKEN", "***"]:
        assert part in result.stdout


# Dry runs


def test_a_dry_run_prints_the_plan_as_json():
    result = run_to_exit("serve", "demo", "--dry-run=json", "--dry-run-device-memory", "80G", "--max-num-seqs", "16",
                         "--trust-remote-code", "--api-key", "s3cret")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    memory = plan["memory"]
    assert plan["device"] == {"kind": "cuda:0", "name": "assumed", "memory_bytes": 80 << 30, "assumed": True,
                              "threads": plan["device"]["threads"]}
    parts = ["weight_bytes", "workspace_bytes", "conv_bytes", "sampler_bytes", "kv_bytes"]
    assert 0 < sum(memory[p] for p in parts) <= memory["usable_bytes"]
    assert memory["conv_slots"] == plan["limits"]["max_num_seqs"] == 16
    assert memory["kv_tokens"] == memory["num_blocks"] * memory["block_size"]
    assert memory["max_concurrency"] == pytest.approx(memory["kv_tokens"] / plan["limits"]["max_model_len"])
    flags = {f["flag"]: f for f in plan["flags"]}
    assert flags["--max-num-seqs"]["here"] == "honoured" and flags["--trust-remote-code"]["here"] == "no effect"
    assert flags["--api-key"]["value"] == "***" and "s3cret" not in result.stdout + result.stderr


def test_a_dry_run_needs_no_weights(tmp_path):
    checkpoint = GOLDENS / "tiny-moe" / "checkpoint"
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert run_to_exit("serve", str(tmp_path), "--device", "cpu", "--port", "0").returncode == 1
    result = run_to_exit("serve", str(tmp_path), "--device", "cpu", "--dry-run", "--dry-run-device-memory", "4G")
    assert result.returncode == 0, result.stderr
    for part in ["context", "maximum concurrency", "weights", "conv states", "KV cache", "--device"]:
        assert part in result.stdout


class Hub(http.server.ThreadingHTTPServer):
    """Serves a checkpoint as org/tiny; remembers which files were asked for."""

    COMMIT = "0123456789012345678901234567890123456789"

    def __init__(self, checkpoint: pathlib.Path):
        self.checkpoint, self.asked = checkpoint, set()
        super().__init__(("127.0.0.1", 0), HubHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/api/models/org/tiny"):
            files = [{"rfilename": f.name} for f in self.server.checkpoint.iterdir()]
            return self.answer(json.dumps({"sha": Hub.COMMIT, "siblings": files}).encode(), "info")
        name = self.path.rsplit("/", 1)[1]
        self.server.asked.add(name)
        body = (self.server.checkpoint / name).read_bytes()
        self.answer(body, hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest())

    def answer(self, body: bytes, etag: str):
        self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_a_dry_run_downloads_small_files_alone(tmp_path):
    hub = Hub(GOLDENS / "tiny-moe" / "checkpoint")
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    result = run_to_exit("serve", "org/tiny", "--device", "cpu", "--dry-run=json", env=env)
    hub.shutdown()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"]["name"] == "org/tiny"
    assert {"config.json", "tokenizer.json"} <= hub.asked
    assert not any(name.endswith(".safetensors") for name in hub.asked)


def test_a_dry_run_lists_what_is_refused():
    result = run_to_exit("serve", "demo", "--device", "cpu", "--dry-run", "--enable-lora", "--tensor-parallel-size", "2")
    assert result.returncode == 1
    assert result.stdout.count("refused ") == 2 and "load balancer" in result.stdout


def test_a_dry_run_says_what_would_fit():
    result = run_to_exit("serve", str(GOLDENS / "tiny-dense" / "checkpoint"), "--dry-run", "--device", "cpu",
                         "--num-gpu-blocks-override", "3")
    assert result.returncode == 1
    assert "The largest length that fits is 48" in result.stderr


# chat and complete


def test_chat_answers_and_leaves(demo):
    result = run_to_exit("chat", "--url", demo.url + "/v1", "-q", "What is 12 + 7?", "--stats")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Using model: demo\n")
    assert "19" in result.stdout
    assert "TTFT: " in result.stdout and "tokens/s" in result.stdout


def test_chat_keeps_the_conversation(demo):
    result = subprocess.run(
        [RVLLM, "chat", "--url", demo.url + "/v1", "--model-name", "demo", "--system-prompt", "Be short."],
        input="Hello\nWhat is 2 + 3?\n", capture_output=True, text=True, timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") == 3 and "5" in result.stdout.split("> ")[2]


def test_complete_continues(demo, client):
    result = run_to_exit("complete", "--url", demo.url + "/v1/", "-q", "Hello", "--max-tokens", "4")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2


def test_clients_send_the_key():
    server = Server("demo", "--api-key", "right")
    try:
        ask = ["complete", "--url", server.url + "/v1", "-q", "Hi", "--max-tokens", "1"]
        wrong = run_to_exit(*ask, "--api-key", "wrong")
        assert wrong.returncode == 1 and "401" in wrong.stderr
        assert run_to_exit(*ask, "--api-key", "right").returncode == 0
        assert run_to_exit(*ask, env={"OPENAI_API_KEY": "right"}).returncode == 0
    finally:
        server.stop()


def test_no_server_is_one_line():
    result = run_to_exit("chat", "--url", "http://127.0.0.1:9/v1", "-q", "x")
    assert result.returncode == 1
    assert result.stderr.startswith("rvllm: error: http://127.0.0.1:9/v1/models: ") and result.stderr.count("\n") == 1


# run-batch


def test_a_batch_is_answered_in_order(tmp_path):
    def request(i: int, url: str, **body) -> str:
        return json.dumps({"custom_id": f"r{i}", "method": "POST", "url": url, "body": {"model": "demo", **body}})

    ask = [{"role": "user", "content": "What is 12 + 7?"}]
    requests = [
        request(0, "/v1/chat/completions", messages=ask, temperature=0),
        request(1, "/v1/completions", prompt="Hello", max_tokens=3),
        request(2, "/v1/chat/completions", messages=ask, temperature=-1),
        request(3, "/v1/chat/completions", messages=ask, stream=True),
        request(4, "/v1/nothing"),
        "{not json",
        "",
        json.dumps({"custom_id": "r6", "method": "POST", "url": "/v1/completions",
                    "body": {"model": "other", "prompt": "x"}}),
        request(7, "/v1/completions", prompt=[1, 2, 3], max_tokens=2, n=2),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(requests) + "\n")
    result = run_to_exit("run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"),
                         "--model", "demo", "--device", "cpu", env={"VLLM_API_KEY": "not asked for"})
    assert result.returncode == 0, result.stderr
    answers = lines(tmp_path / "out.jsonl")
    assert [a["custom_id"] for a in answers] == ["r0", "r1", "r2", "r3", "r4", None, "r6", "r7"]
    assert [a["response"]["status_code"] for a in answers] == [200, 200, 400, 400, 400, 400, 404, 200]
    assert "19" in answers[0]["response"]["body"]["choices"][0]["message"]["content"]
    assert answers[0]["error"] is None and answers[0]["id"].startswith("vllm-")
    assert answers[2]["error"]["error"]["param"] == "temperature" and answers[2]["response"]["body"] is None
    assert answers[3]["error"] == "Request must not be sent in stream mode"
    assert answers[4]["error"].startswith("URL /v1/nothing was used. Supported endpoints: ")
    assert answers[5]["error"].startswith("line 6 is no batch request")
    assert len(answers[7]["response"]["body"]["choices"]) == 2


def test_a_batch_without_its_file_fails(tmp_path):
    result = run_to_exit("run-batch", "-i", str(tmp_path / "none"), "-o", str(tmp_path / "out"), "--model", "demo")
    assert result.returncode == 1 and "--input-file" in result.stderr


# bench


def bench(demo, *arguments: str) -> subprocess.CompletedProcess:
    return run_to_exit("bench", "serve", "--base-url", demo.url, "--disable-tqdm", *arguments, seconds=120)


def test_bench_serve_measures_completions(demo, tmp_path):
    result = bench(demo, "--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "5",
                   "--max-concurrency", "3", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99",
                   "--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json",
                   "--ready-check-timeout-sec", "5", "--num-warmups", "2", "--read-bandwidth", "1e10")
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ["Serving Benchmark Result", "Successful requests:                     6",
                 "Total generated tokens:                  30", "Total input tokens:                      120",
                 "Mean TTFT (ms):", "P99 E2EL (ms):", "Floor of TPOT (ms):"]:
        assert line in result.stdout, result.stdout
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["completed"] == 6 and saved["output_lens"] == [5] * 6
    assert saved["max_concurrent_requests"] <= 3 and saved["floor"]["tpot_ms"] > 0
    assert all(t > 0 for t in saved["ttfts"])


def test_bench_serve_measures_chats_and_rates(demo):
    result = bench(demo, "--backend", "openai-chat", "--num-prompts", "4", "--random-input-len", "8", "--output-len", "4",
                   "--request-rate", "50", "--burstiness", "0.5", "--goodput", "e2el:100000")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Request goodput (req/s):" in result.stdout and "Burstiness factor: 0.5 (Gamma distribution)" in result.stdout


@pytest.mark.parametrize("name", ["sharegpt", "custom"])
def test_bench_serve_reads_files(demo, tmp_path, name):
    path = tmp_path / "set.json"
    if name == "sharegpt":
        turns = [{"from": "human", "value": "What is 12 + 7, please?"}, {"from": "gpt", "value": "It is 19, I think."}]
        path.write_text(json.dumps([{"conversations": turns}] * 3))
    else:
        path.write_text('{"prompt": "Hello there"}\n{"prompt": "And again", "output_tokens": 2}\n')
    result = bench(demo, "--dataset-name", name, "--dataset-path", str(path), "--num-prompts", "4", "--output-len", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Successful requests:                     4" in result.stdout


def test_bench_serve_counts_failures(demo):
    result = bench(demo, "--num-prompts", "3", "--random-input-len", "4", "--endpoint", "/v1/nothing")
    assert result.returncode == 1
    assert "Failed requests:                         3" in result.stdout and "404" in result.stderr


def test_bench_latency_prints_the_floors(tmp_path):
    result = run_to_exit("bench", "latency", "--model", "demo", "--device", "cpu", "--batch-size", "2", "--input-len", "16",
                         "--output-len", "4", "--num-iters", "2", "--num-iters-warmup", "1", "--peak-flops", "1e12",
                         "--output-json", str(tmp_path / "r.json"), seconds=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("; floor ") == 2 and "Avg latency: " in result.stdout
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["prefill_floor_ms"] > 0 and len(saved["latencies"]) == 2


def test_bench_startup_times_the_phases(tmp_path):
    result = run_to_exit("bench", "startup", "--model", str(GOLDENS / "tiny-dense" / "checkpoint"), "--device", "cpu",
                         "--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "2",
                         "--output-json", str(tmp_path / "r.json"), seconds=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "STARTUP TIME BENCHMARK RESULTS" in result.stdout
    saved = json.loads((tmp_path / "r.json").read_text())
    assert len(saved["warm_startup_times"]) == 2
    phases = saved["warm_startup_phases"]
    assert set(phases) == {"configuration", "device", "weights", "buffers", "tokenizer and template"}
    assert sum(phases.values()) <= saved["avg_warm_startup_time"]


# The start of a server


def test_a_start_is_logged_phase_by_phase(demo):
    log = demo.logs()
    (line,) = [line for line in log.splitlines() if "Start phases: " in line]
    for phase in ["configuration", "device", "weights", "buffers", "tokenizer and template"]:
        assert phase in line
    for part in ["weights  ", "workspace", "conv states", "KV cache", "Maximum concurrency for "]:
        assert part in log
