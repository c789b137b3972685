"""Streams and files on their way to S3: the whole of them or nothing, whatever the other side does. No servers."""

import io
import itertools
import os
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest.mock import Mock
from urllib.parse import unquote

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from api import transfer as module
from api.client import CallFailed, Client
from api.loader import Loader
from api.transfer import Note, Transfer, _exactly
from engine.errors import CommandError


class Api:
    """Answers as the HTTP API does, and keeps what it was asked. `parts` of `part_bytes` is what an upload may have."""

    url = "http://api"

    def __init__(self, parts=0, part_bytes=8):
        self.asked = []
        self.state = {
            "uploadId": "u",
            "partBytes": part_bytes,
            "parts": parts,
            "size": None,
            "headers": {},
            "fileKey": "k",
        }

    def ask(self, method, path, params=None, **_):
        self.asked.append(f"{method} {path}")
        first, count = (params or {}).get("first", 1), (params or {}).get("count", 100)
        urls = [
            {"partNumber": n, "url": f"http://s3/{n}"}
            for n in range(first, min(first + count, self.state["parts"] + 1))
        ]
        return self.state | {"urls": urls}

    insist = ask


@pytest.fixture
def sent(monkeypatch):
    """The parts that were sent, by URL."""
    parts = {}

    def put(self, url, data, headers, sent):
        parts[url] = data

    monkeypatch.setattr(Transfer, "_put", put)
    monkeypatch.setattr(module, "LAST_CALL_SECONDS", 0.01)
    return parts


@pytest.mark.parametrize(("part_bytes", "most"), [(8, 4), (20 * 2**20, 3), (105 * 2**20, 1)])
def test_no_more_than_some_bytes_of_large_parts_are_held(monkeypatch, part_bytes, most):
    under_way, seen, lock = [0], [], threading.Lock()

    def put(self, url, data, headers, sent):
        with lock:
            under_way[0] += 1
            seen.append(under_way[0])
        time.sleep(0.02)
        with lock:
            under_way[0] -= 1

    monkeypatch.setattr(Transfer, "_put", put)
    state = Api(parts=12, part_bytes=part_bytes).ask("GET", "/")
    Transfer(Api(parts=12))._send(state, {}, lambda number: b"x", lambda n: None)
    assert max(seen) <= most
    assert len(seen) == 12


@pytest.mark.parametrize(("size", "fits"), [(0, True), (7, True), (16, True), (17, False), (100, False)])
def test_a_stream_that_is_longer_than_an_upload_can_be_is_refused_and_not_cut(sent, size, fits):
    api, data = Api(parts=2), bytes(range(size))
    if fits:
        assert Transfer(api).stream(io.BytesIO(data), "s", lambda n: None, lambda by_hand: None) == "k"
        assert b"".join(sent[url] for url in sorted(sent)) == data
        return
    wholes = []
    with pytest.raises(CommandError, match="a stream may have"):
        Transfer(api).stream(io.BytesIO(data), "s", lambda n: None, wholes.append)
    assert (wholes, api.asked[-1]) == ([], "DELETE /uploads/u")
    assert "POST /uploads/u/complete" not in api.asked


def test_what_another_writes_into_a_pipe_after_its_end_is_not_looked_at(sent):
    class Pipe(io.BytesIO):
        ends = 0

        def read(self, size=-1):
            data = super().read(size)
            self.ends += not data
            # The end is seen by the part that it cuts short, and by the one after it.
            return b"more" if self.ends > 2 else data

    assert Transfer(Api(parts=5)).stream(Pipe(bytes(10)), "s", lambda n: None, lambda by_hand: None) == "k"
    assert [len(data) for data in sent.values()] == [8, 2]


def test_a_pipe_that_does_not_block_is_read_to_its_end():
    read, write = os.pipe()
    os.set_blocking(read, False)

    def speak():
        for word in (b"a", b"bc", b"d"):
            time.sleep(0.05)
            os.write(write, word)
        os.close(write)

    speaker = threading.Thread(target=speak)
    with os.fdopen(read, "rb") as content:
        speaker.start()
        assert [_exactly(content, 3), _exactly(content, 3), _exactly(content, 3)] == [b"abc", b"d", b""]
    speaker.join()


def test_urls_that_grow_old_are_asked_for_anew(sent, monkeypatch):
    fresh, old = Api(parts=3), Api(parts=3)
    assert Transfer(fresh).stream(io.BytesIO(bytes(20)), "s", lambda n: None, lambda by_hand: None) == "k"
    monkeypatch.setattr(module, "URLS_FRESH_SECONDS", -1)
    assert Transfer(old).stream(io.BytesIO(bytes(20)), "s", lambda n: None, lambda by_hand: None) == "k"
    assert (fresh.asked.count("GET /uploads/u"), old.asked.count("GET /uploads/u")) == (0, 3)


@pytest.mark.parametrize("late", [False, True])
def test_a_stream_is_whole_or_broken_off_and_never_something_between(late):
    api, wholes = Api(), []
    transfer = Transfer(api)

    def whole(by_hand):
        wholes.append(by_hand)
        if late:  # the stop comes when the end was taken for the end already, and has to wait for that
            stopper = threading.Thread(target=transfer.stop)
            stopper.start()
            stops.append(stopper)

    stops = []
    if late:
        assert transfer.stream(io.BytesIO(), "s", lambda n: None, whole) == "k"
        stops[0].join()
        assert api.asked == ["POST /uploads", "POST /uploads/u/complete"]
    else:
        stopper = threading.Timer(0.05, transfer.stop)  # while the end of the stream is doubted
        stopper.start()
        with pytest.raises(CommandError):
            transfer.stream(io.BytesIO(), "s", lambda n: None, whole)
        stopper.join()
        assert wholes == []
        assert "POST /uploads/u/complete" not in api.asked
        assert "DELETE /uploads/u" in api.asked


def test_what_nobody_thought_of_is_told_of_its_file_and_does_not_keep_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(Transfer, "file", lambda self, file, note, sent: file.name)
    for name in ("bad", "good"):
        (tmp_path / name).write_bytes(b"{}")

    class Api:
        url = "http://api"

        def process(self, key, options, ticket):
            if key == "bad":
                raise ValueError("odd")
            return "job of good"

    bad, good = Loader(Api(), {}, wait=False, through_api=False).run([str(tmp_path / "bad"), str(tmp_path / "good")])
    assert "ValueError: odd" in str(bad.error)
    assert (good.error, good.job_id) == (None, "job of good")


class Clock:
    """Stands for the module `time`: what is waited for passes at once."""

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


def client_of(answer):
    client = Client("http://api")
    client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer))
    return client


def problem(status, kind):
    told = {"type": f"urn:headrace:problem:{kind}", "detail": f"it is {kind}"}
    return httpx.Response(status, headers={"X-Request-ID": "r"}, json=told)


def test_an_api_that_is_being_restarted_is_waited_for_where_a_call_is_safe_to_repeat(monkeypatch):
    monkeypatch.setattr("api.client.POLL_SECONDS", 0.001)
    asked = []

    def answer(request):
        asked.append(request.headers.get("Idempotency-Key"))
        if len(asked) == 1:
            raise httpx.ConnectError("refused")
        if len(asked) < 4:
            return problem(503, "unavailable")
        return httpx.Response(202, headers={"X-Request-ID": "r"}, json={"jobId": "job"})

    client = client_of(answer)
    assert client.process("k", {}, "ticket") == "job"
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


@pytest.mark.parametrize(
    ("status", "kind", "kept"),
    [
        (503, "unavailable", True),
        (503, "wrong_clock", True),
        (500, "internal", True),
        (401, "unauthorized", True),
        (409, "conflict", False),
        (404, "not_found", False),
    ],
)
def test_a_stream_that_is_whole_is_not_thrown_away_because_the_api_is(sent, status, kind, kept):
    api = Api(parts=5)
    ask = api.ask

    def insist(method, path, **more):
        if path.endswith("/complete"):
            raise CallFailed(status, "no", kind)
        return ask(method, path, **more)

    api.insist = insist
    with pytest.raises(CommandError if kept else CallFailed) as raised:
        Transfer(api).stream(io.BytesIO(bytes(20)), "s", lambda n: None, lambda by_hand: None)
    assert ("DELETE /uploads/u" in api.asked) is not kept
    assert ("http://api/uploads/u/complete" in str(raised.value)) is kept


def test_no_part_is_under_way_when_an_upload_is_given_up(monkeypatch):
    under_way, lock, api = [0], threading.Lock(), Api(parts=5)
    ask = api.ask

    def put(self, url, data, headers, sent):
        with lock:
            under_way[0] += 1
        try:
            time.sleep(0.1)
            if url.endswith("/1"):
                raise CommandError("no")
            time.sleep(0.1)
        finally:
            with lock:
                under_way[0] -= 1

    def deleted(method, path, **more):
        assert method != "DELETE" or under_way == [0]
        return ask(method, path, **more)

    monkeypatch.setattr(Transfer, "_put", put)
    api.ask = deleted
    with pytest.raises(CommandError, match="no"):
        Transfer(api).stream(io.BytesIO(bytes(40)), "s", lambda n: None, lambda by_hand: None)
    assert api.asked[-1] == "DELETE /uploads/u"


def test_a_stream_that_is_stored_and_cannot_be_submitted_is_told_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(Transfer, "stream", lambda *_: "some/key.ndjson")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}")))

    def answer(request):
        if request.url.path == "/files":
            return httpx.Response(200, headers={"X-Request-ID": "r"}, json={"bucket": "b", "files": []})
        return problem(*kinds[0])

    kinds = [(422, "refused")]

    [load] = Loader(client_of(answer), {}, wait=False, through_api=False).run(["-"])
    again = "`headrace load s3://b/some/key.ndjson` with the same options submits it"
    assert f"it is refused; the file is stored: {again}" in str(load.error)
    monkeypatch.setattr("api.client.PATIENCE_SECONDS", 0)
    kinds[0] = (502, "")
    [load] = Loader(client_of(answer), {}, wait=False, through_api=False).run(["-"])
    assert f"the file is stored: if `headrace jobs --file some/key.ndjson` shows no job, {again}" in str(load.error)


@pytest.mark.parametrize("key", ["a/../b", "./a", "..", "a/./b c", "a//b", "ü/%2e"])
def test_a_key_is_asked_for_as_it_is(key):
    asked = []

    def answer(request):
        asked.append(request.url.raw_path.decode())
        return httpx.Response(202, headers={"X-Request-ID": "r"}, json={"jobId": "job"})

    client_of(answer).process(key, {}, "ticket")
    assert unquote(asked[0]) == f"/process/{key}"


def test_a_watcher_for_whom_there_is_no_room_learns_all_the_same_what_a_job_waits_for(monkeypatch):
    clock, details = Clock(), []
    monkeypatch.setattr("api.client.time", clock)
    # There is room for nobody for 42 seconds; with a half between each two questions.
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


@pytest.mark.parametrize(
    ("status", "said", "tries"),
    [(400, "<Code>RequestTimeout</Code>", 2), (503, "<Code>SlowDown</Code>", 2), (403, "<Code>AccessDenied</Code>", 1)],
)
def test_a_part_is_sent_again_where_that_may_help(monkeypatch, status, said, tries):
    answers = [httpx.Response(status, text=said), httpx.Response(200)]
    asked, sent = [], []

    def answer(request):
        asked.append(request.content)
        return answers.pop(0)

    transfer = Transfer(Api())
    monkeypatch.setattr(transfer, "_http", httpx.Client(transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(transfer._stopped, "wait", lambda seconds: False)
    if tries == 1:
        with pytest.raises(CommandError, match="answered with 403"):
            transfer._put("http://s3/1", b"data", {}, sent.append)
    else:
        transfer._put("http://s3/1", b"data", {}, sent.append)
    assert (asked, sent) == ([b"data"] * tries, [4] * (tries - 1))


@pytest.mark.parametrize("change", [b"", b"appended", None])
def test_a_file_that_is_written_to_while_it_is_sent_becomes_no_object(sent, monkeypatch, tmp_path, change):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path, api = tmp_path / "f.ndjson", Api(parts=3)
    path.write_bytes(bytes(20))
    os.utime(path, (1, 1))
    api.state |= {"size": 20, "stored": []}
    put = Transfer._put

    def change_it(self, url, data, headers, sent):
        put(self, url, data, headers, sent)
        if url.endswith("/1") and change is not None:
            with path.open("ab" if change else "r+b") as file:
                file.write(change or b"written over")

    monkeypatch.setattr(Transfer, "_put", change_it)
    note = Note(api.url, str(path), [20, 1])
    if change is None:
        assert Transfer(api).file(path, note, lambda n: None) == "k"
    else:
        with pytest.raises(CommandError, match=r"f\.ndjson was written to while it was sent"):
            Transfer(api).file(path, note, lambda n: None)
        assert api.asked[-1] == "DELETE /uploads/u"
        assert note.get("uploadId") is None
    assert sum(map(len, sent.values())) == 20


def test_why_an_api_is_not_reached_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(CallFailed, match=r"does not answer \(ConnectError: .*refused"):
        Client(f"http://127.0.0.1:{port}").ask("GET", "/jobs")


def certified(folder):
    """A certificate for localhost that nobody vouches for, and its key, in one file."""
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
        with pytest.raises(CallFailed, match=r"CERTIFICATE_VERIFY_FAILED.*; SSL_CERT_FILE names"):
            Client(url).ask("GET", "/jobs")
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert Client(url).ask("GET", "/jobs") == {"jobs": []}
        with pytest.raises(CallFailed, match="CERTIFICATE_VERIFY_FAILED") as other:
            Client(url.replace("localhost", "127.0.0.1")).ask("GET", "/jobs")
        assert "SSL_CERT_FILE" not in str(other.value)  # it would not help
        server.shutdown()


def test_a_user_without_a_home_has_nowhere_to_resume_from_and_loads_all_the_same(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(module.Path, "home", Mock(side_effect=RuntimeError("no home")))
    module.forget_old()
    note = Note("http://api", "f", [1])
    note.put(key="k")
    assert (note.get("key"), Note("http://api", "f", [1]).get("key")) == ("k", None)
