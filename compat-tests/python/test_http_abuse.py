"""HTTP as no library would send it: each case a 4xx, a clean answer or a closed connection, and the server as before."""

import contextlib
import gzip
import json
import socket
import time

import pytest
from conftest import Server

BODY = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server():
    server = Server("demo", "--api-key", "secret", "--enable-prompt-tokens-details")
    yield server
    assert server.process.poll() is None and "panicked" not in server.logs()
    server.stop()


@pytest.fixture(autouse=True)
def unharmed(server):
    yield
    assert server.get("/health").status_code == 200


def exchange(server: Server, data: bytes, seconds: float = 30) -> bytes:
    """Everything the server says until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # it may answer and close before it has heard all
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while piece := connection.recv(1 << 16):
                answer += piece
        return answer


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


PATHS = ["//v1/models", "/%2fv1/models", "/v1%2fmodels", "/%76%31/models", "/./v1/models", "/x/../v1/models", "/v1/models%00",
         "/V1/models", "http://elsewhere/v1/models", "http://elsewhere//v1/models", "/v1/models;x", "/v1\\models", "*", "v1/models"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", ["x", "127.0.0.1", "evil.example/health", "x@y", ""])
def test_no_spelling_of_a_path_passes_the_key(server, path, host):
    answer = exchange(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer == b"" or 400 <= statuses(answer)[0] < 500, answer
    assert b'"object":"list"' not in answer


GARBAGE = {
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2 with prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
    "SSH": b"SSH-2.0-scanner\r\n\r\n",
    "SMB": b"\x00\x00\x00\x54\xffSMB" + bytes(80) + b"\r\n\r\n",
    "zeros": bytes(4096),
    "no version": b"GET /health\r\n\r\n",
    "HTTP/9": b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
    "a method of a kilobyte": b"A" * 1024 + b" /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "a space in a header name": b"GET /health HTTP/1.1\r\nho st: x\r\n\r\n",
    "NUL in a header": b"GET /health HTTP/1.1\r\nhost: x\r\na: \x00\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n",
    "ten thousand headers": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"".join(b"h%d: v\r\n" % i for i in range(10_000)) + b"\r\n",
    "a header of five megabytes": b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * (5 << 20) + b"\r\n\r\n",
    "a path of a megabyte": b"GET /" + b"p" * (1 << 20) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n" + BODY,
    "a negative length": HEAD + b"content-length: -1\r\n\r\n" + BODY,
    "length and chunks": HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": HEAD + b"authorization: Bearer secret\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
    "a chunk of 2^64": HEAD + b"authorization: Bearer secret\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff1\r\n{}\r\n",
    "a body cut short": HEAD + b"authorization: Bearer secret\r\ncontent-length: 500\r\n\r\n" + BODY,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage(server, name):
    answer = exchange(server, GARBAGE[name])
    assert b"200 OK" not in answer, answer[:300]
    assert answer == b"" or all(400 <= status < 500 or status == 505 for status in statuses(answer)), answer[:300]


def test_pipelined_requests_are_answered_in_order(server):
    one = HEAD + b"authorization: Bearer secret\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    two = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    bad = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer secret\r\ncontent-length: 1\r\n\r\n{"
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(one + two + bad + one + last)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    assert statuses(answer) == [200, 200, 400, 200, 200], answer


def test_compressed_bodies_are_not_unpacked(server):
    """A gzip bomb is bytes that are no JSON."""
    bomb = gzip.compress(b" " * (64 << 20))
    r = server.post("/v1/completions", content=bomb, headers={"content-type": "application/json", "content-encoding": "gzip",
                                                              "authorization": "Bearer secret"})
    assert r.status_code == 400 and "json_invalid" in r.json()["error"]["message"]


def test_a_slow_head_is_cut_off(server):
    """A byte every half second never ends a head: after five seconds the connection is closed."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.settimeout(0.5)
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\na: ")
            while time.monotonic() < started + 60:
                connection.sendall(b"b")
                try:
                    piece = connection.recv(100)
                    assert b"200" not in piece
                    if not piece:
                        break
                except TimeoutError:
                    pass
        except ConnectionError:
            pass
    assert 3 < time.monotonic() - started < 30


def test_header_limits_are_the_flags():
    server = Server("demo", "--h11-max-header-count", "20", "--h11-max-incomplete-event-size", "16384")
    try:
        ask = lambda headers: exchange(server, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + headers + b"\r\n")
        assert statuses(ask(b"".join(b"h%d: v\r\n" % i for i in range(10)))) == [200]
        assert statuses(ask(b"".join(b"h%d: v\r\n" % i for i in range(30)))) == [431]
        assert statuses(ask(b"h: " + b"v" * 10_000 + b"\r\n")) == [200]
        assert statuses(ask(b"h: " + b"v" * 20_000 + b"\r\n")) in ([431], [])
    finally:
        server.stop()


def test_keep_alive_follows_the_environment():
    server = Server("demo", env={"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "1"})
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            for _ in range(2):
                connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"200 OK" in connection.recv(4096)
            started = time.monotonic()
            assert connection.recv(4096) == b""
            assert time.monotonic() - started < 15
    finally:
        server.stop()


def test_body_limit_follows_the_environment():
    server = Server("demo", env={"VLLM_HTTP_MAX_REQUEST_BODY_SIZE": "2000"})
    try:
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "user": "u" * 1000}).status_code == 200
        r = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "user": "u" * 3000})
        assert r.status_code == 413 and r.json()["error"]["code"] == 413
    finally:
        server.stop()


def test_salts_separate_the_prefix_cache(server):
    """A prompt that one tenant has sent is no faster for another."""
    def cached(salt) -> int:
        body = {"prompt": [5 + i % 50 for i in range(200)], "max_tokens": 1, "cache_salt": salt}
        r = server.post("/v1/completions", body, headers={"authorization": "Bearer secret"})
        return r.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0
    assert cached("a") > 100
    assert cached("b") == 0 and cached(None) == 0


def test_disconnects_at_every_byte(server):
    data = HEAD + b"authorization: Bearer secret\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    for end in range(len(data)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(data[:end])
    server.wait_idle()
