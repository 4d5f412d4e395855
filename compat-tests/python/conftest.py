"""Servers under test: the release binary on the demo model and on the golden checkpoints."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

import httpx
import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "compat-tests" / "goldens"
RVLLM = os.environ.get("RVLLM", str(ROOT / "target" / "release" / "rvllm"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`rvllm serve ARGS`, ready when /health answers 200."""

    def __init__(self, *args: str, env: dict | None = None, ready_s: float = 60):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [RVLLM, "serve", *args, "--host", "127.0.0.1", "--port", str(self.port)]
        started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"exit code {self.process.returncode} before ready:\n{self.logs()}")
            try:
                if self.is_ready():
                    break
            except httpx.TransportError:
                pass
            if time.monotonic() - started > ready_s:
                self.stop()
                raise RuntimeError(f"not ready after {ready_s} s:\n{self.logs()}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        return httpx.get(self.url + "/health", timeout=1).status_code == 200

    def logs(self) -> str:
        return pathlib.Path(self.log.name).read_text()

    def client(self, **kw) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=kw.pop("api_key", "none"), max_retries=0, timeout=120, **kw)

    def post(self, path: str, body=None, **kw) -> httpx.Response:
        if body is not None:
            kw["json"] = body
        return httpx.post(self.url + path, timeout=120, **kw)

    def get(self, path: str, **kw) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **kw)

    def metric(self, name: str, **labels) -> float:
        """Sum of the series of this name whose labels match."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            head = line.split("{")[0].split(" ")[0]
            if head == name and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def wait_idle(self, seconds: float = 20) -> None:
        """Until nothing runs or waits and every KV block is free again."""
        end = time.monotonic() + seconds
        gauges = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
        while (values := [self.metric(g) for g in gauges]) != [0, 0, 0]:
            assert time.monotonic() < end, f"still busy: {dict(zip(gauges, values))}\n{self.logs()[-4000:]}"
            time.sleep(0.05)

    def signal(self, number=signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def run_to_exit(*args: str, env: dict | None = None, seconds: float = 30) -> subprocess.CompletedProcess:
    return subprocess.run(
        [RVLLM, *args], capture_output=True, text=True, timeout=seconds, env={**os.environ, **(env or {})}
    )


def golden(model: str) -> dict:
    return json.loads((GOLDENS / model / "golden.json").read_text())


@pytest.fixture(scope="session")
def demo():
    # No parser flags: they come from the checkpoint.
    server = Server("demo", "--enable-prompt-tokens-details")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(demo):
    return demo.client()


@pytest.fixture(scope="session", params=["tiny-dense", "tiny-moe"])
def tiny(request):
    """A golden checkpoint in float32: (name, server)."""
    server = Server(str(GOLDENS / request.param / "checkpoint"), "--dtype", "float32", "--served-model-name", "tiny",
                    "--max-model-len", "2048", "--reasoning-parser", "none", "--tool-call-parser", "none")
    yield request.param, server
    server.stop()
