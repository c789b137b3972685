"""The client of an API that is slow, busy or away, or has a certificate of an unknown authority. Stubs answer."""

import itertools
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import unquote

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from api.client import CallFailed, Client
from engine.errors import CommandError
from tests.answering import client_of, problem


class Clock:
    """Stands in for the module `time`: `sleep` moves the clock and returns at once."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_job_that_has_not_moved_is_asked_what_it_waits_for(monkeypatch):
    asked, clock = [], Clock()
    monkeypatch.setattr("api.client.time", clock)
    moved = iter([200, 304, 304, 304, 200])

    def answer(request):
        asked.append((request.url.path, request.headers.get("Prefer")))
        if request.url.path == "/jobs/j":
            waits = "a worker" if len(asked) < 6 else None
            return httpx.Response(200, headers={"X-Request-ID": "r"}, json={"status": "PENDING", "waitingFor": waits})
        ended = {"status": "COMPLETED" if len(asked) > 2 else "PENDING"}
        code = next(moved)
        if code == 304:
            clock.sleep(int(request.headers["Prefer"].removeprefix("wait=")))
        return httpx.Response(code, headers={"X-Request-ID": "r", "ETag": '"t"'}, json=ended if code == 200 else None)

    client = client_of(answer)
    told = [(state["status"], state.get("waitingFor")) for state in client.states("j", wait=20)]
    assert told == [("PENDING", None), ("PENDING", "a worker"), ("PENDING", "a worker"), ("COMPLETED", None)]
    waits = [prefer for path, prefer in asked if path == "/status/j"]
    assert waits == [None, "wait=3", "wait=20", "wait=20", "wait=20"]


def test_an_api_that_is_being_restarted_is_waited_for_where_a_call_is_safe_to_repeat(monkeypatch):
    monkeypatch.setattr("api.client.POLL_SECONDS", 0.001)
    asked = []

    def answer(request):
        asked.append(request.headers.get("Idempotency-Key"))
        if len(asked) == 1:
            raise httpx.ConnectError("refused")
        if len(asked) < 4:
            return problem(503, "unavailable")
        return httpx.Response(202, headers={"X-Request-ID": "r"}, json={"jobId": "job", "status": "PENDING"})

    client = client_of(answer)
    assert client.process("k", {}, "ticket") == ("job", "PENDING")
    assert asked == ["ticket"] * 4
    asked.clear()
    with pytest.raises(CallFailed, match="does not answer"):
        client.process("k", {})
    monkeypatch.setattr("api.client.PATIENCE_SECONDS", 0.05)
    with pytest.raises(CallFailed, match="it is queue_full"):
        client_of(lambda request: problem(503, "queue_full")).process("k", {}, "ticket")
    for status, kind in ((503, "access_denied"), (404, "not_found"), (422, "refused")):
        asked.clear()
        refusing = client_of(lambda request, s=status, k=kind: asked.append(None) or problem(s, k))
        with pytest.raises(CallFailed, match=f"it is {kind}"):
            refusing.process("k", {}, "ticket")
        assert len(asked) == 1


@pytest.mark.parametrize("key", ["a/../b", "./a", "..", "a/./b c", "a//b", "ü/%2e"])
def test_a_key_is_asked_for_as_it_is(key):
    asked = []

    def answer(request):
        asked.append(request.url.raw_path.decode())
        return httpx.Response(202, headers={"X-Request-ID": "r"}, json={"jobId": "job", "status": "PENDING"})

    client_of(answer).process(key, {}, "ticket")
    assert unquote(asked[0]) == f"/process/{key}"


def test_a_watcher_for_whom_there_is_no_room_learns_all_the_same_what_a_job_waits_for(monkeypatch):
    clock, details = Clock(), []
    monkeypatch.setattr("api.client.time", clock)
    # No slot is free for waiting: 84 requests, half a second apart, are answered with 429 and 304 in turn.
    statuses = itertools.chain([200], itertools.islice(itertools.cycle([429, 304]), 84), [200])

    def answer(request):
        if request.url.path == "/jobs/j":
            details.append(clock.now)
            return httpx.Response(
                200, headers={"X-Request-ID": "r"}, json={"status": "PENDING", "waitingFor": "a worker"}
            )
        status = next(statuses)
        if status == 304:
            assert (request.headers.get("Prefer"), request.headers["If-None-Match"]) == (None, '"t"')
        told = {"status": "COMPLETED" if next(count) else "PENDING"} if status == 200 else None
        return httpx.Response(status, headers={"X-Request-ID": "r", "ETag": '"t"'}, json=told)

    count = itertools.count()
    told = [(state["status"], state.get("waitingFor")) for state in client_of(answer).states("j", wait=20)]
    waiting = [("PENDING", "a worker")] * 2
    assert (told, details) == ([("PENDING", None), *waiting, ("COMPLETED", None)], [3.5, 24.0])


def test_an_answer_that_never_comes_is_not_waited_for_by_the_hour(tmp_path):
    waits = {}

    def answer(request):
        waits[request.url.path] = request.extensions["timeout"]["read"]
        return httpx.Response(200, headers={"X-Request-ID": "r"}, json={"status": "COMPLETED", "fileKey": "k"})

    client = Client("http://api")
    client._http = httpx.Client(
        base_url=client.url, timeout=client._http.timeout, transport=httpx.MockTransport(answer)
    )
    (tmp_path / "file").write_bytes(b"{}")
    list(client.states("j", wait=20))
    client.ask("GET", "/jobs")
    client.upload(tmp_path / "file")
    assert waits == {"/status/j": 50, "/jobs": 120, "/upload": 3600}


def test_why_an_api_is_not_reached_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(CallFailed, match=r"does not answer \(ConnectError: .*refused"):
        Client(f"http://127.0.0.1:{port}").ask("GET", "/jobs")


def certified(folder):
    """A self-signed certificate for localhost and its key, in one file."""
    key, now = rsa.generate_private_key(65537, 2048), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, *plain)
    path = folder / "localhost.pem"
    path.write_bytes(pem + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


class Hello(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("X-Request-ID", "r")
        self.end_headers()
        self.wfile.write(b'{"jobs": []}')


def test_an_authority_of_ones_own_is_trusted_where_it_is_named(tmp_path, monkeypatch):
    path = certified(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with HTTPServer(("127.0.0.1", 0), Hello) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://localhost:{server.server_port}"
        with pytest.raises(CallFailed, match=r"CERTIFICATE_VERIFY_FAILED.*; set SSL_CERT_FILE"):
            Client(url).ask("GET", "/jobs")
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert Client(url).ask("GET", "/jobs") == {"jobs": []}
        with pytest.raises(CallFailed, match="CERTIFICATE_VERIFY_FAILED") as other:
            Client(url.replace("localhost", "127.0.0.1")).ask("GET", "/jobs")
        assert "SSL_CERT_FILE" not in str(other.value)  # the host name is wrong, so further authorities would not help
        server.shutdown()


@pytest.mark.parametrize("detail", [{"a": 1}, ["a"], 5, None])
def test_a_problem_that_is_not_of_headrace_is_told_as_it_came(detail):
    client = client_of(lambda request: httpx.Response(401, json={"detail": detail}))
    with pytest.raises(CallFailed, match="GET /queue was answered with 401"):
        client.ask("GET", "/queue")


def test_a_token_is_not_left_out_because_the_address_has_a_user():
    with pytest.raises(CommandError, match="API_URL has a user and API_TOKEN is set"):
        Client("http://user:pw@api.example", "hr_token")
