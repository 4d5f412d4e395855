"""HTTPS, client certificates, reload of changed files, Unix sockets."""

import json
import shutil
import socket
import ssl
import subprocess
import time

import httpx
import pytest
from conftest import RVLLM, Server, run_to_exit

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True)


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, directory, name: str):
        self.directory = directory
        self.key, self.cert = str(directory / f"{name}.key"), str(directory / f"{name}.pem")
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                "-subj", f"/CN={name}", "-keyout", self.key, "-out", self.cert)

    def issue(self, name: str, serial: int) -> tuple[str, str]:
        """Certificate and key for localhost, usable by servers and clients."""
        base = self.directory / name
        key, request, cert, extensions = (f"{base}.{end}" for end in ["key", "csr", "pem", "ext"])
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        with open(extensions, "w") as file:
            file.write("subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n"
                       "extendedKeyUsage=serverAuth,clientAuth\n")
        openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key, "-set_serial", str(serial),
                "-days", "2", "-extfile", extensions, "-out", cert)
        return cert, key


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"), "authority")


class TlsServer(Server):
    """`ready` asks /health with this context."""

    def __init__(self, *args: str, context: ssl.SSLContext):
        self.context = context
        super().__init__(*args)

    def is_ready(self) -> bool:
        return self.ask().status_code == 200

    @property
    def https(self) -> str:
        return self.url.replace("http:", "https:")

    def ask(self, path: str = "/health", context: ssl.SSLContext | None = None) -> httpx.Response:
        return httpx.get(self.https + path, verify=context or self.context, timeout=10)

    def serial(self) -> int:
        with socket.create_connection(("127.0.0.1", self.port)) as raw:
            with self.context.wrap_socket(raw, server_hostname="localhost") as connection:
                return int(connection.getpeercert()["serialNumber"], 16)


def context(ca: Authority, client: tuple[str, str] | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=ca.cert)
    if client:
        made.load_cert_chain(*client)
    return made


def test_https_serves_and_streams(ca):
    cert, key = ca.issue("server", 1)
    server = TlsServer("demo", "--ssl-certfile", cert, "--ssl-keyfile", key, context=context(ca))
    try:
        body = {"prompt": "a", "max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", server.https + "/v1/completions", json=body, verify=server.context, timeout=60) as r:
            lines = [line for line in r.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 2
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 5
        # Plain HTTP and an unknown authority get nowhere, and hurt nobody.
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url + "/health", timeout=10)
        with pytest.raises(httpx.ConnectError):
            server.ask(context=ssl.create_default_context())
        assert server.ask().status_code == 200
        assert "Starting vLLM server on https://127.0.0.1" in server.logs()
        for version in [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]:
            only = context(ca)
            only.minimum_version = only.maximum_version = version
            assert server.ask(context=only).status_code == 200
    finally:
        server.stop()


def test_client_certificates(ca, tmp_path):
    cert, key = ca.issue("mtls-server", 2)
    client, stranger = ca.issue("client", 3), Authority(tmp_path, "stranger").issue("stranger-client", 4)
    flags = ["demo", "--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", ca.cert]
    server = TlsServer(*flags, "--ssl-cert-reqs", "2", context=context(ca, client))
    try:
        for other in [context(ca), context(ca, stranger)]:
            with pytest.raises(httpx.TransportError):
                server.ask(context=other)
        assert server.ask().status_code == 200
    finally:
        server.stop()
    server = TlsServer(*flags, "--ssl-cert-reqs", "1", context=context(ca))
    try:
        assert server.ask(context=context(ca, client)).status_code == 200
        with pytest.raises(httpx.TransportError):
            server.ask(context=context(ca, stranger))
    finally:
        server.stop()


def test_changed_files_are_taken_over_and_broken_ones_not(ca, tmp_path):
    cert, key = tmp_path / "live.pem", tmp_path / "live.key"

    def install(pair):
        # As secret mounts do it: the new files appear at once, by renaming.
        for source, target in zip(pair, [cert, key]):
            shutil.copy(source, tmp_path / "new")
            (tmp_path / "new").rename(target)

    install(ca.issue("first", 11))
    server = TlsServer("demo", "--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--enable-ssl-refresh",
                       context=context(ca))
    try:
        assert server.serial() == 11
        cert.write_text("broken")
        end = time.monotonic() + 20
        while "the changed TLS files are not used" not in server.logs():
            assert time.monotonic() < end
            time.sleep(0.1)
        assert server.serial() == 11
        install(ca.issue("second", 12))
        end = time.monotonic() + 20
        while server.serial() != 12:
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        server.stop()


def test_ciphers(ca):
    cert, key = ca.issue("cipher-server", 5)
    server = TlsServer("demo", "--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ciphers", "ECDHE+CHACHA20",
                       context=context(ca))
    try:
        old = context(ca)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            with old.wrap_socket(raw, server_hostname="localhost") as connection:
                assert connection.cipher()[0] == "ECDHE-ECDSA-CHACHA20-POLY1305"
        old.set_ciphers("ECDHE+AESGCM")
        with pytest.raises(httpx.TransportError):
            server.ask(context=old)
    finally:
        server.stop()


def test_unusable_files_are_named(ca, tmp_path):
    cert, key = ca.issue("unused", 6)
    _, other_key = ca.issue("other", 7)
    encrypted = str(tmp_path / "encrypted.key")
    openssl("ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", encrypted)
    for flags, says in [
        (["--ssl-certfile", "/no/cert.pem", "--ssl-keyfile", key], "--ssl-certfile: /no/cert.pem"),
        (["--ssl-certfile", key, "--ssl-keyfile", key], "--ssl-certfile"),
        (["--ssl-certfile", cert, "--ssl-keyfile", cert], "--ssl-keyfile"),
        (["--ssl-certfile", cert, "--ssl-keyfile", other_key], "--ssl-keyfile"),
        (["--ssl-certfile", cert, "--ssl-keyfile", encrypted], "--ssl-keyfile"),
        (["--ssl-keyfile", key], "--ssl-keyfile: needs --ssl-certfile"),
        (["--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-cert-reqs", "2"], "--ssl-cert-reqs: needs --ssl-ca-certs"),
        (["--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ciphers", "RC4-MD5"], "--ssl-ciphers"),
    ]:
        r = run_to_exit("serve", "demo", "--port", "0", *flags)
        assert r.returncode == 1 and says in r.stderr and "panicked" not in r.stderr, (flags, r.stderr)


def test_unix_socket(tmp_path):
    path = str(tmp_path / "rvllm.sock")
    # What a dead server left behind is replaced.
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    log = open(tmp_path / "log", "w+")
    process = subprocess.Popen([RVLLM, "serve", "demo", "--uds", path], stdout=log, stderr=subprocess.STDOUT)
    try:
        client = httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://server", timeout=60)
        end = time.monotonic() + 60
        while True:
            try:
                assert client.get("/health").status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
        body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3
        second = run_to_exit("serve", "demo", "--uds", path)
        assert second.returncode == 1 and "--uds" in second.stderr
        process.terminate()
        assert process.wait(20) == 0
        text = (tmp_path / "log").read_text()
        assert f"Starting vLLM server on unix:{path}" in text and 'INFO:      - "POST /v1/completions HTTP/1.1" 200 OK' in text
        assert not (tmp_path / "rvllm.sock").exists()
    finally:
        process.kill()
