"""Many clients, rude clients, few resources: nothing leaks a slot, a block or a task, and a well-behaved client sees none of it.

Everything is bounded in count and time and stays on the loopback interface. Raw sockets, because polite HTTP libraries cannot
be rude enough.
"""

import asyncio
import contextlib
import json
import pathlib
import resource
import subprocess
import threading
import time

import httpx
import pytest
from conftest import RVLLM, Server, free_port

STREAMS = 1000
ENDLESS = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server():
    # A queue without bound: all streams are accepted, most of them wait.
    server = Server("demo", "--disable-uvicorn-access-log")
    yield server
    server.stop()


def raise_fd_limit(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            pytest.skip(f"{count} open files are not allowed here")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def rss_mib(server: Server) -> float:
    for line in pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def open_files(server: Server) -> int:
    return len(list(pathlib.Path(f"/proc/{server.process.pid}/fd").iterdir()))


def wait_until(holds, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@contextlib.contextmanager
def nothing_leaks(server: Server, rss_growth_mib: float = 64):
    """Afterwards every gauge is back at zero, files are closed, memory is about what it was."""
    server.wait_idle(60)
    files, rss = open_files(server), rss_mib(server)
    yield
    server.wait_idle(60)
    wait_until(lambda: open_files(server) <= files + 2, "connections stay open")
    assert rss_mib(server) <= rss + rss_growth_mib, f"{rss} MiB became {rss_mib(server)}"
    answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 3, "ignore_eos": True})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
    assert server.process.poll() is None and "panicked" not in server.logs()


class Victim:
    """A polite client beside the rude ones: every request must succeed with the same answer."""

    BODY = {"prompt": "The victim", "max_tokens": 4, "temperature": 0, "ignore_eos": True}

    def __init__(self, server: Server):
        self.server, self.stop, self.wrong, self.count = server, threading.Event(), [], 0
        self.expected = server.post("/v1/completions", self.BODY).json()["choices"][0]["text"]
        self.thread = threading.Thread(target=self.run)

    def run(self):
        with httpx.Client(timeout=120) as client:
            while not self.stop.is_set():
                try:
                    r = client.post(self.server.url + "/v1/completions", json=self.BODY)
                    if r.status_code != 200 or r.json()["choices"][0]["text"] != self.expected:
                        self.wrong.append(r.text)
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                self.count += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(120)
        assert not self.thread.is_alive() and not self.wrong and self.count > 0, self.wrong[:3]


def request(path: str, body: dict, extra: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{extra}content-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def connect(server: Server):
    return await asyncio.wait_for(asyncio.open_connection("127.0.0.1", server.port), 30)


async def close(writer) -> None:
    writer.transport.abort()
    await asyncio.sleep(0)


async def open_stream(server: Server, body: dict = ENDLESS, extra: str = ""):
    reader, writer = await connect(server)
    writer.write(request("/v1/completions", body, extra))
    await writer.drain()
    return reader, writer


def test_a_thousand_open_streams(server):
    raise_fd_limit(STREAMS + 200)

    async def run():
        streams = await asyncio.gather(*(open_stream(server) for _ in range(STREAMS)))
        heads = await asyncio.gather(*(asyncio.wait_for(reader.readline(), 120) for reader, _ in streams))
        assert all(head.startswith(b"HTTP/1.1 200") for head in heads)
        wait_until(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
                   >= STREAMS * 0.9, "the streams do not run or wait")
        for _, writer in streams:
            await close(writer)

    asyncio.run(run())  # the allocator keeps what a thousand need at once; a second thousand must need no more
    with nothing_leaks(server):
        asyncio.run(run())


def test_a_cancel_storm(server):
    """Connections that break at every stage, a hundred at a time; the victim runs beside them."""
    raise_fd_limit(1000)
    whole = request("/v1/completions", ENDLESS)

    async def rude(i: int):
        reader, writer = await connect(server)
        stage = i % 5
        if stage == 0:
            writer.write(whole[: 1 + i % len(whole)])
        else:
            writer.write(whole)
        await writer.drain()
        if stage == 2:
            await asyncio.wait_for(reader.readline(), 60)
        elif stage == 3:
            await asyncio.wait_for(reader.readuntil(b"data: "), 60)
        elif stage == 4:
            writer.write_eof()
            await asyncio.sleep(0.01)
        await close(writer)

    async def run():
        for start in range(0, 1000, 100):
            await asyncio.gather(*(rude(i) for i in range(start, start + 100)))

    with nothing_leaks(server), Victim(server):
        asyncio.run(run())


def test_slow_readers(server):
    """They ask for much and read nothing; what they asked for ends without them, and waits as one merged event."""
    body = {**ENDLESS, "max_tokens": 100, "logprobs": 5}

    async def run():
        streams = await asyncio.gather(*(open_stream(server, body, "connection: close\r\n") for _ in range(40)))
        await asyncio.gather(*(asyncio.wait_for(reader.readline(), 120) for reader, _ in streams))
        while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") > 1:
            await asyncio.sleep(0.2)
        # Nobody was waited for. Half of them go, the others read to the end.
        for _, writer in streams[:20]:
            await close(writer)
        for reader, _ in streams[20:]:
            text = await asyncio.wait_for(reader.read(), 60)
            assert b'"finish_reason":"length"' in text and b"data: [DONE]\n\n" in text

    with nothing_leaks(server), Victim(server):
        asyncio.run(asyncio.wait_for(run(), 300))


def test_large_headers_and_bodies(server):
    async def exchange(data: bytes) -> bytes:
        reader, writer = await connect(server)
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        # The server may answer and close before it has read all, and the rest of it be reset.
        answer = b""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
        await close(writer)
        return answer

    async def run():
        small = {"prompt": "x", "max_tokens": 1}
        big_header = request("/v1/completions", small, f"x-big: {'h' * (64 << 10)}\r\n")
        answers = await asyncio.gather(*(exchange(big_header) for _ in range(100)))
        assert all(b"200 OK" in answer for answer in answers), answers[:3]
        declared = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9999999999\r\n\r\n{"
        assert all(b" 413 " in answer for answer in await asyncio.gather(*(exchange(declared) for _ in range(50))))
        # Chunks without end: the limit counts what arrives.
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        endless = (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                   b"transfer-encoding: chunked\r\n\r\n" + chunk * 40)
        for answer in await asyncio.gather(*(exchange(endless) for _ in range(4))):
            assert b" 413 " in answer or answer == b"", answer

    with nothing_leaks(server, rss_growth_mib=160), Victim(server):
        asyncio.run(run())


def test_idle_connections_are_closed(server):
    """Five seconds without a request, or with half a head, and the connection is gone."""
    raise_fd_limit(1000)

    async def run():
        pairs = await asyncio.gather(*(connect(server) for _ in range(500)))
        for i, (_, writer) in enumerate(pairs):
            if i % 2:
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nslow: ")
        for reader, _ in pairs:
            # To its end: a 408 or nothing.
            await asyncio.wait_for(reader.read(), 60)

    with nothing_leaks(server), Victim(server):
        asyncio.run(run())


def test_few_open_files():
    """With 256 files at most, connections beyond them wait; those that are served stay served."""
    port = free_port()

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    server = Server.__new__(Server)
    command = [RVLLM, "serve", "demo", "--host", "127.0.0.1", "--port", str(port)]
    # The log goes to a full disk, which hurts nobody either.
    with open("/dev/full", "w") as full:
        server.process = subprocess.Popen(command, stdout=full, stderr=full, preexec_fn=limit)
    server.port, server.url = port, f"http://127.0.0.1:{port}"
    try:
        def answers():
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(server.url + "/health", timeout=1).status_code == 200
            assert server.process.poll() is None
            return False

        wait_until(answers, "not ready")

        async def run():
            # The victim has its connection before the crowd comes.
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=1)) as client:
                ask = lambda: client.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2})
                assert (await ask()).status_code == 200
                crowd = [await connect(server) for _ in range(300)]
                for _ in range(5):
                    assert (await ask()).status_code == 200
                for _, writer in crowd:
                    await close(writer)

        asyncio.run(run())
        wait_until(answers, "it does not recover")
        assert server.metric("process_max_fds") == 256
        server.signal()
        assert server.wait(20) == 0
    finally:
        server.stop()
