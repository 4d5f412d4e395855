"""Metrics that agree with the answers, logs as vLLM writes them, traces that arrive, and a real Prometheus that reads it all."""

import http.server
import json
import shutil
import struct
import subprocess
import threading
import time

import httpx
import pytest
from conftest import Server, free_port, run_to_exit

HELLO = [{"role": "user", "content": "Hello!"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def rises(server: Server, names: list[str], act) -> dict[str, float]:
    """By how much each series rose, summed over its labels."""
    server.wait_idle()
    before = {name: server.metric(name) for name in names}
    act()
    server.wait_idle()
    return {name: server.metric(name) - value for name, value in before.items()}


COUNTED = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total", "vllm:request_params_n_count",
           "vllm:request_params_n_sum", "vllm:request_prompt_tokens_sum", "vllm:request_generation_tokens_sum",
           "vllm:request_max_num_generation_tokens_count", "vllm:e2e_request_latency_seconds_count", "vllm:request_queue_time_seconds_count"]


def test_counters_are_the_usage_of_the_answers(demo):
    usages = []

    def act():
        body = {"messages": HELLO, "temperature": 1, "seed": 1, "n": 3, "max_tokens": 20}
        usages.append(demo.post("/v1/chat/completions", body).json()["usage"])
        body = {"prompt": "a", "max_tokens": 9, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        lines = demo.post("/v1/completions", body).text.split("\n\n")
        usages.append(json.loads(lines[-3].removeprefix("data: "))["usage"])

    rise = rises(demo, COUNTED, act)
    completion = sum(usage["completion_tokens"] for usage in usages)
    assert rise["vllm:generation_tokens_total"] == rise["vllm:request_generation_tokens_sum"] == completion
    # Each of three choices is a sequence with the prompt of its own; usage counts the prompt once.
    prompts = 3 * usages[0]["prompt_tokens"] + usages[1]["prompt_tokens"]
    assert rise["vllm:prompt_tokens_total"] == rise["vllm:request_prompt_tokens_sum"] == prompts
    assert rise["vllm:request_success_total"] == rise["vllm:e2e_request_latency_seconds_count"] == 4
    assert (rise["vllm:request_params_n_count"], rise["vllm:request_params_n_sum"]) == (2, 4)
    assert rise["vllm:request_max_num_generation_tokens_count"] == 2


def test_prompt_tokens_split_by_source(demo):
    body = {"prompt": [7 + i % 90 for i in range(120)], "max_tokens": 1, "cache_salt": "observability"}
    names = ["vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:prompt_tokens_cached_total"]
    demo.post("/v1/completions", body)
    usage = {}
    rise = rises(demo, names, lambda: usage.update(demo.post("/v1/completions", body).json()["usage"]))
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert list(rise.values()) == [120, cached, cached]
    total = demo.metric("vllm:prompt_tokens_by_source_total")
    assert total == demo.metric("vllm:prompt_tokens_total")


def test_a_stop_string_ends_a_request_successfully(demo):
    body = {"prompt": "Hello", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    word = demo.post("/v1/completions", body).json()["choices"][0]["text"].split()[1]
    demo.wait_idle()
    series = [("vllm:request_success_total", {"finished_reason": "stop"}), ("vllm:request_generation_tokens_sum", {})]
    before = [demo.metric(name, **labels) for name, labels in series]
    # So long that the engine cannot be at its end before it is told to stop.
    choice = (answer := demo.post("/v1/completions", {**body, "stop": word, "max_tokens": 3000}).json())["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)
    # The server knows first, the engine a moment later.
    expected = [before[0] + 1, before[1] + answer["usage"]["completion_tokens"]]
    end = time.monotonic() + 20
    while [demo.metric(name, **labels) for name, labels in series] != expected:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_clients_that_leave_are_no_success(demo):
    def act():
        body = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", demo.url + "/v1/completions", json=body, timeout=60) as r:
            next(r.iter_lines())

    assert rises(demo, ["vllm:request_success_total"], act) == {"vllm:request_success_total": 0}


def test_http_series(demo):
    def act():
        demo.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})
        demo.post("/v1/chat/completions", {"messages": "no"})
        demo.get("/nowhere")
        demo.get("/health")

    def count(**labels):
        return demo.metric("http_requests_total", **labels)

    chat = {"handler": "/v1/chat/completions", "method": "POST"}
    before = [count(**chat, status="2xx"), count(**chat, status="4xx"), count(handler="none", status="4xx")]
    act()
    after = [count(**chat, status="2xx"), count(**chat, status="4xx"), count(handler="none", status="4xx")]
    assert [b - a for a, b in zip(before, after)] == [1, 1, 1]
    assert count(handler="/health") == 0 and count(handler="/metrics") == 0


def test_a_streams_time_is_that_of_its_body(demo):
    def totals():
        return [
            demo.metric("http_request_duration_seconds_sum", handler="/v1/completions"),
            demo.metric("vllm:e2e_request_latency_seconds_sum"),
        ]

    before = totals()
    started = time.monotonic()
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", demo.url + "/v1/completions", json=body, timeout=60) as r:
        for _ in r.iter_lines():
            pass
    end = time.monotonic() + 10
    while totals()[0] == before[0]:
        assert time.monotonic() < end
        time.sleep(0.05)
    http, engine = (after - was for after, was in zip(totals(), before))
    # The engine's time ends with the last token; the headers have left with the first.
    assert 0 < 0.95 * engine < http < time.monotonic() - started


def test_tool_parsing_is_counted(demo):
    name = "vllm:tool_call_parser_invocations_total"
    body = {"messages": HELLO, "tools": [TOOL], "max_tokens": 30, "temperature": 0}
    labels = {"request_type": "chat_completions", "mode": "non_streaming"}
    before = demo.metric(name, **labels)
    demo.post("/v1/chat/completions", body)
    assert demo.metric(name, **labels) == before + 1
    labels["mode"] = "streaming"
    before = demo.metric(name, **labels)
    demo.post("/v1/chat/completions", {**body, "stream": True})
    assert demo.metric(name, **labels) > before


def test_flags_choose_what_metrics_show():
    server = Server("demo", "--disable-log-stats", env={"PROMETHEUS_DISABLE_CREATED_SERIES": "true"})
    try:
        page = server.get("/metrics").text
        assert "vllm:" not in page and "_created" not in page
        assert "http_request_duration_highr_seconds_bucket" in page and "process_resident_memory_bytes" in page
    finally:
        server.stop()
    buckets = '{"request_latency": [0.5, 2]}'
    server = Server("demo", "--custom-histogram-buckets", buckets, "--served-model-name", "a", "b")
    try:
        bounds = [line for line in server.get("/metrics").text.splitlines() if line.startswith("vllm:e2e_request_latency_seconds_bucket")]
        assert len(bounds) == 3 and 'le="0.5",model_name="a"' in bounds[0]
    finally:
        server.stop()
    r = run_to_exit("serve", "demo", "--port", "0", "--custom-histogram-buckets", '{"latency": [1]}')
    assert r.returncode == 1 and "--custom-histogram-buckets" in r.stderr


def test_the_log_is_vllms():
    server = Server("demo", "--enable-log-requests", "--enable-log-outputs", "--max-log-len", "7",
                    "--disable-access-log-for-endpoints", "/health,/metrics", "--served-model-name", "x", "y",
                    env={"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_LOG_STATS_INTERVAL": "0.5"})
    try:
        body = {"model": "x", "prompt": "Seven letters and more", "max_tokens": 40, "ignore_eos": True}
        server.post("/v1/completions", body, headers={"X-Request-Id": "req-1"})
        server.post("/v1/completions", {**body, "stream": True}, headers={"X-Request-Id": "req-2"})
        server.get("/metrics")
        time.sleep(1.2)
        server.get("/version")
        log = server.logs()
        for line in ["vLLM API server version 0.33.0", "served as [\"x\", \"y\"]", "GPU KV cache size: ", "Maximum concurrency for ",
                     "Starting vLLM server on http://127.0.0.1", "Available routes are:", "Route: /v1/chat/completions, Methods: POST",
                     "Application startup complete.", "Received request cmpl-req-1: params: SamplingParams(n=1, presence_penalty=0.0, ",
                     'Request cmpl-req-1 details: prompt: "<|start", prompt_token_ids: [', "Generated response cmpl-req-1: output: ",
                     "Generated response cmpl-req-2 (streaming delta): output: ", "Generated response cmpl-req-2 (streaming complete): output: ",
                     "finish_reason: length", '"POST /v1/completions HTTP/1.1" 200 OK', '"GET /version HTTP/1.1" 200 OK',
                     "Engine 000: Avg prompt throughput: "]:
            assert line in log, f"{line!r} is missing from\n{log}"
        assert "letters" not in log and "GET /metrics" not in log and "GET /health" not in log
    finally:
        server.stop()
    quiet = Server("demo", "--uvicorn-log-level", "warning", env={"VLLM_LOGGING_LEVEL": "ERROR"})
    try:
        quiet.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert quiet.logs() == ""
    finally:
        quiet.stop()
    r = run_to_exit("serve", "demo", "--port", "0", "--enable-log-outputs")
    assert r.returncode == 1 and "--enable-log-outputs" in r.stderr


def fields(message: bytes) -> dict[int, list]:
    """A protobuf message's fields by number: ints, or bytes."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        match key & 7:
            case 0:
                value = varint()
            case 1:
                value, at = struct.unpack_from("<Q", message, at)[0], at + 8
            case 2:
                length = varint()
                value, at = message[at : at + length], at + length
            case other:
                raise AssertionError(f"wire type {other}")
        found.setdefault(key >> 3, []).append(value)
    return found


def attributes(message: dict[int, list], number: int) -> dict:
    pairs = {}
    for item in message.get(number, []):
        pair = fields(item)
        (value,) = fields(pair[2][0]).items()
        convert = {1: lambda v: v.decode(), 3: int, 4: lambda v: struct.unpack("<d", struct.pack("<Q", v))[0]}[value[0]]
        pairs[pair[1][0].decode()] = convert(value[1][0])
    return pairs


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self):
        self.requests = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append((self.path, self.headers, body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[tuple[dict, dict]]:
        """(resource attributes, span) pairs."""
        found = []
        for _, _, body in self.requests:
            resource_spans = fields(fields(body)[1][0])
            resource = attributes(fields(resource_spans[1][0]), 1)
            for span in fields(resource_spans[2][0])[2]:
                found.append((resource, fields(span)))
        return found


def test_traces_arrive_with_vllms_attributes():
    collector = Collector()
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "vllm-here", "OTEL_BSP_SCHEDULE_DELAY": "50",
           "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=t1"}
    server = Server("demo", "--otlp-traces-endpoint", collector.url, env=env)
    try:
        trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        body = {"prompt": "a", "max_tokens": 4, "ignore_eos": True, "temperature": 0.5, "seed": 1}
        usage = server.post("/v1/completions", body, headers={"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "t"}).json()["usage"]
        server.post("/v1/completions", body, headers={"traceparent": f"00-{trace}-{parent}-00"})
        server.post("/v1/completions", body, headers={"traceparent": "garbage"})
        server.signal()
        assert server.wait(20) == 0
        # The unsampled one is left out, the last starts a trace of its own; stopping sends what waits.
        spans = collector.spans()
        assert len(spans) == 2
        resource, span = spans[0]
        assert resource["service.name"] == "vllm-here" and collector.requests[0][1]["x-tenant"] == "t1"
        assert (span[1][0].hex(), span[4][0].hex(), span[5], span[6]) == (trace, parent, [b"llm_request"], [2])
        assert spans[1][1][1][0].hex() != trace and 4 not in spans[1][1]
        found = attributes(span, 9)
        assert found["gen_ai.request.id"] == "cmpl-t" and found["gen_ai.request.n"] == 1
        assert found["gen_ai.request.max_tokens"] == 4 and found["gen_ai.request.temperature"] == 0.5
        assert found["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
        assert found["gen_ai.usage.completion_tokens"] == usage["completion_tokens"] == 4
        parts = [found[f"gen_ai.latency.time_in_{part}"] for part in ["queue", "model_prefill", "model_decode"]]
        assert all(part >= 0 for part in parts) and sum(parts) <= found["gen_ai.latency.e2e"] + 1e-3
        assert 0 < found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]
        assert span[7][0] < span[8][0] < time.time_ns()
    finally:
        server.stop()


def test_a_collector_that_is_away_costs_nothing_but_spans():
    env = {"OTEL_BSP_SCHEDULE_DELAY": "1", "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}
    server = Server("demo", "--otlp-traces-endpoint", "grpc://127.0.0.1:1", env=env)
    try:
        for _ in range(3):
            assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
        end = time.monotonic() + 30
        while server.metric("rvllm:otlp_spans_dropped_total") < 3:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert server.logs().count("could not be exported") == 1
    finally:
        server.stop()
    r = run_to_exit("serve", "demo", "--port", "0", "--collect-detailed-traces", "all")
    assert r.returncode == 1 and "--otlp-traces-endpoint" in r.stderr


# What the panels of vLLM's published Grafana dashboards ask, written from the metrics' names: per-model rates, quantiles,
# means and heat maps. `J` is the dashboards' selector, `R` their interval.
HISTOGRAMS = ["e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds",
              "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds",
              "request_time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
              "request_params_n", "request_params_max_tokens", "request_max_num_generation_tokens"]
QUERIES = [
    "sum(rate(vllm:request_success_total{J}[R]))",
    "sum by (finished_reason) (increase(vllm:request_success_total{J}[R]))",
    "sum(rate(vllm:prompt_tokens_total{J}[R]))",
    "sum(rate(vllm:generation_tokens_total{J}[R]))",
    "sum by (source) (rate(vllm:prompt_tokens_by_source_total{J}[R]))",
    '(sum(rate(http_requests_total{job="rvllm",status="5xx"}[R])) or vector(0)) / (sum(rate(http_requests_total{job="rvllm"}[R])) > 0)',
    "count(vllm:num_requests_running{J})",
    "sum(vllm:num_requests_running{J})", "sum(vllm:num_requests_waiting{J})",
    "sum by (reason) (vllm:num_requests_waiting_by_reason{J})",
    "max(vllm:kv_cache_usage_perc{J})",
    "sum(rate(vllm:prefix_cache_hits_total{J}[R])) / sum(rate(vllm:prefix_cache_queries_total{J}[R]))",
    "sum(rate(vllm:num_preemptions_total{J}[R]))",
    "sum by (reason) (rate(vllm:admission_rejections_total{J}[R]))",
    "vllm:engine_sleep_state{J}",
    'vllm:cache_config_info{job="rvllm"}',
    "count(up{job=\"rvllm\"} == 0) or vector(0)",
    'process_resident_memory_bytes{job="rvllm"}',
    'histogram_quantile(0.99, sum by (le) (rate(http_request_duration_highr_seconds_bucket{job="rvllm"}[R])))',
    'sum by (handler) (rate(http_request_duration_seconds_sum{job="rvllm"}[R])) / sum by (handler) (rate(http_request_duration_seconds_count{job="rvllm"}[R]))',
]
for name in HISTOGRAMS:
    QUERIES += [
        f"histogram_quantile(0.95, sum by (le) (rate(vllm:{name}_bucket{{J}}[R])))",
        f"sum(rate(vllm:{name}_sum{{J}}[R])) / sum(rate(vllm:{name}_count{{J}}[R]))",
        f"sum by (le) (increase(vllm:{name}_bucket{{J}}[R]))",
    ]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's package prometheus is not installed")
def test_prometheus_answers_the_dashboards(demo, tmp_path):
    port = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text("global: {scrape_interval: 500ms, scrape_timeout: 500ms}\nscrape_configs:\n"
                      f"- {{job_name: rvllm, static_configs: [{{targets: ['127.0.0.1:{demo.port}']}}]}}\n")
    with open(tmp_path / "log", "w") as log:
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
             f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def ask(query: str) -> list:
        r = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=30)
        if r.status_code == 503:  # it listens before it is ready
            return []
        assert r.status_code == 200, (query, r.text)
        return r.json()["data"]["result"]

    def until(query: str, holds) -> None:
        end = time.monotonic() + 60
        while True:
            try:
                if holds(ask(query)):
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < end and prometheus.poll() is None, (query, (tmp_path / "log").read_text()[-2000:])
            time.sleep(0.2)

    try:
        until('up{job="rvllm"}', lambda result: result and result[0]["value"][1] == "1")
        for i in range(4):
            body = {"prompt": [9 + i % 2] * 60, "max_tokens": 12, "ignore_eos": True, "cache_salt": "prometheus"}
            assert demo.post("/v1/completions", body).status_code == 200
            time.sleep(0.6)
        # The counters, as stored, are those of the page.
        demo.wait_idle()
        total = demo.metric("vllm:generation_tokens_total")
        until("sum(vllm:generation_tokens_total)", lambda result: result and float(result[0]["value"][1]) == total)
        for query in QUERIES:
            query = query.replace("J}", 'job="rvllm",model_name="demo"}').replace("[R]", "[1m]")
            result = ask(query)
            assert result, f"{query} has no answer"
            assert any(sample["value"][1] != "NaN" for sample in result), f"{query} is not a number"
        types = httpx.get(f"http://127.0.0.1:{port}/api/v1/metadata", timeout=30).json()["data"]
        assert types["vllm:iteration_tokens_total"][0]["type"] == "histogram"
        assert types["vllm:num_preemptions_total"][0]["type"] == "counter"
        assert types["http_request_size_bytes"][0]["type"] == "summary"
    finally:
        prometheus.terminate()
        prometheus.wait(20)
