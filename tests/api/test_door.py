"""Requests before they reach the application, on an API over real servers: bad ones cost little and never end it."""

import contextlib
import io
import resource
import signal
import socket
import struct
import threading
import time
import uuid
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import pytest
from waitress.buffers import OverflowableBuffer

from api.door import _Channel, open_door
from api.server import connection_limit
from engine.ports import free_port
from engine.settings import Settings
from tests.running import Running, alive, until

MIB = 1024 * 1024


def told(line):
    """All that is received on a connection until it is closed."""
    pieces = b""
    with contextlib.suppress(OSError):
        while piece := line.recv(65536):
            pieces += piece
    return pieces


def sent(port, *pieces, pause=0.0):
    """Send these bytes, as far as the server takes them, `pause` seconds apart; returns its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        with contextlib.suppress(OSError):
            for piece in pieces:
                line.sendall(piece)
                time.sleep(pause)
        return told(line)


@pytest.mark.parametrize(
    "head",
    [
        b"POST /process/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://[x]/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_a_head_that_cannot_be_read_is_answered(live, head):
    answer = sent(live.port, head)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 ")), answer
    assert b"application/problem+json" in answer
    assert "Traceback" not in live.log()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET a://" + b"9" * 30_000 + b" x\r\nHost: localhost\r\n", b"400"),  # waitress would block for a minute
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX:" + b" " * 100 + b"a\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX:" + b"\t " * 15_000 + b"\0\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX:" + b" " * 99 + b"a" + b" " * 99 + b"b\r\n", b"200"),
        (b"GET http://localhost:%d/healthz HTTP/1.1\r\nHost: localhost\r\n" % 3000, b"200"),
    ],
)
def test_a_head_that_would_take_long_to_look_at_is_refused(live, head, status):
    answer = sent(live.port, head + b"Connection: close\r\n\r\n")
    assert answer.split(b" ", 2)[1] == status, answer[:200]


def test_a_path_of_any_length_makes_a_short_line_of_the_log(live):
    mark = uuid.uuid4().hex
    for answer in (live.http.get(f"/{mark}" + "/a" * 10_000), live.http.get(f"/{mark}" + ".a" * 10_000)):
        assert answer.status_code == 404
    lines = until(lambda: [x for x in live.log().splitlines() if mark in x][1:], what="its lines in the log")
    assert max(map(len, lines)) < 2000


@pytest.mark.parametrize("begin", [b"1" * 8000, b"0\r\n" + b"a: b\r\n" * 3000])
def test_a_chunk_whose_head_has_no_end_is_refused_before_it_costs_anything(live, begin):
    head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    answer = sent(live.port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[begin] * 4)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert b"a chunk" in answer


def test_a_body_that_is_no_form_is_refused_when_its_head_is_there(live):
    head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 30000000\r\n\r\n"
    assert sent(live.port, head).startswith(b"HTTP/1.1 415 ")


def test_what_comes_with_a_refused_head_is_no_other_request(live):
    """The body of a refused request must not be parsed as the next request."""
    head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: %b\r\nContent-Type: application/json\r\n"
    body = b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\nx\r\n--x--\r\n"
    for apart in (False, True):
        mark = uuid.uuid4().hex.encode()
        whole = head % mark + b"Content-Length: %d\r\n\r\n" % len(body)
        before = live.log().count('"refused"')
        pieces = [whole, body] if apart else [whole + body]
        assert sent(live.port, *pieces, pause=0.05).startswith(b"HTTP/1.1 415 ")
        until(lambda mark=mark: mark.decode() in live.log(), what="its line in the log")
        assert live.log().count('"refused"') == before + 1


def test_what_follows_a_refused_request_on_its_connection_is_not_parsed():
    channel = _Channel.__new__(_Channel)
    channel.requests, channel.request = [SimpleNamespace(error="refused")], None
    channel.parser_class = Mock()
    assert channel.received(b"POST /upload HTTP/1.1\r\n\r\n") is True
    channel.parser_class.assert_not_called()


def test_a_body_of_nobody_who_is_known_is_refused_when_its_head_is_there(live):
    """Otherwise a crowd of unknown callers could fill the memory with bodies."""

    def head(host):
        return b"POST /process/x HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 500000\r\n\r\n"

    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as known:
        known.sendall(head(b"localhost"))
        assert sent(live.port, head(b"evil.example")).startswith(b"HTTP/1.1 403 ")
        # Meanwhile the server waits for the body of the known caller.
        known.settimeout(0.1)
        assert told(known) == b""


def test_a_head_that_does_not_end_is_refused_while_it_is_cheap(live):
    answer = sent(live.port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ", *[b"a" * 10_000] * 4)
    assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.0 431 ")), answer[:200]


def test_a_client_that_takes_nothing_of_its_answer_is_let_go_after_a_while():
    server = SimpleNamespace(adj=SimpleNamespace(channel_timeout=120), maintenance=Mock(), channel_class=None)
    server.add_task = Mock()
    stuck, reads, waits = (Mock(total_outbufs_len=left, last_activity=at) for left, at in ((9, 0), (9, 990), (0, 0)))
    server.active_channels = {1: stuck, 2: reads, 3: waits}
    real = server.maintenance
    open_door(server, Settings(), Mock(), Mock())
    server.maintenance(1000)
    real.assert_called_once_with(1000)
    assert [channel.handle_close.called for channel in (stuck, reads, waits)] == [True, False, False]


def test_a_media_type_is_the_same_in_any_case_of_letters(live):
    body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nx\r\n--B--\r\n'
    answer = live.http.post("/upload", content=body, headers={"Content-Type": "Multipart/Form-Data; boundary=B"})
    assert answer.status_code == 201


@pytest.fixture
def full(live, tmp_path):
    """An API whose files cannot grow beyond 1 MiB: a client, the port, and its process."""
    port = free_port()
    api = Running("api", live.settings, tmp_path / "api.log", port=port, api_spool_dir=tmp_path)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

        def up():
            with contextlib.suppress(httpx.HTTPError):
                return http.get("/healthz").status_code == 200

        until(up, what="the API's first answer")
        resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, (MIB, MIB))
        yield http, port, api
    api.end()


def test_a_spool_without_room_refuses_the_body_and_not_the_next_ones(full, tmp_path):
    http, port, api = full
    head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    for _ in range(6):  # more than there are slots
        answer = sent(port, head + b"Content-Length: 3000000\r\n\r\n", *[b"x" * 1448] * 2000)
        assert answer == b"" or b" 503 " in answer.splitlines()[0]
    piece = b"x" * 1448
    chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
    sent(port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 2000)
    assert alive(api.process.pid)
    assert http.get("/healthz").status_code == 200
    small = http.post("/upload", files={"file": ("a.txt", b"x")})
    assert small.status_code == 201
    said = [line for line in api.lines() if "cannot be spooled" in line["event"]]
    assert len(said) == 7
    assert {line["folder"] for line in said} == {str(tmp_path)}
    assert "Traceback" not in api.log.read_text()


def test_a_client_that_has_left_waits_no_longer(live, submit_paused):
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", live.port), timeout=30) as line:
            line.sendall(
                b"GET /status/%b HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=30\r\n\r\n" % submit_paused.encode()
            )
            time.sleep(0.05)

    def free():
        return live.http.get(f"/status/{submit_paused}", headers={"Prefer": "wait=1"}).status_code == 200

    until(free, what="a place among those who wait")


@pytest.fixture
def submit_paused(live):
    """The id of a job that stays PENDING."""
    key = live.http.post("/upload", files={"file": ("later.ndjson", b"{}")}).json()["fileKey"]
    job = live.http.post(f"/process/{key}", json={"runAt": "2100-01-01T00:00:00Z"}).json()["jobId"]
    yield job
    live.http.post(f"/jobs/{job}/cancel")


def test_many_faults_of_one_request_make_no_large_answer(live):
    many = {f"name-{number}" * 20: 0 for number in range(4000)}
    for answer in (
        live.http.post("/process/x", json=many),
        live.http.post("/process/x", json={"x" * 900_000: 1}),
        live.http.get("/jobs", params={f"a{number}": 1 for number in range(3000)}),
        live.http.post("/process", json={"fileKeys": list(range(1000))}),
        live.http.post("/process/x", json=[1]),
    ):
        assert answer.status_code == 422
        assert len(answer.content) < 10_000
    assert "JSON but not an object" in answer.json()["detail"]


@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n"])
def test_a_client_that_asks_first_and_sends_nothing_is_answered_and_so_is_its_next_request(live, length):
    ask = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n" + length + b"\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as line:
        for _ in range(2):
            line.sendall(ask)
            answer = b""
            while not answer.endswith(b"}"):
                piece = line.recv(4096)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200 "), answer


def test_a_client_that_asks_first_and_is_gone_before_the_answer_holds_up_nobody(live):
    # Sending `100 Continue` fails while the server is still parsing the request.
    for number in range(300):
        with socket.create_connection(("127.0.0.1", live.port), timeout=30) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            length = b"0" if number % 2 else b"5"
            line.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: %b\r\n\r\n" % length)
    assert live.http.get("/healthz", timeout=30).status_code == 200


def test_a_connection_that_ends_while_its_lock_is_held_lets_go_of_what_waits_on_it():
    """Sending `100 Continue` to a client that has gone closes its connection under this lock."""
    channel, waiting = _Channel.__new__(_Channel), Mock()
    channel.requests_lock, channel.outbuf_lock = threading.Lock(), threading.Condition()
    channel.requests, channel.request, channel.outbufs, channel.socket = [Mock(), waiting], None, [], Mock()
    channel._map, channel._fileno, channel.server = {}, 99, Mock(active_channels={})
    with channel.requests_lock:
        channel.handle_close()
    waiting.leave.assert_called_once_with()


def test_what_two_threads_have_to_send_is_sent_once():
    """The loop flushes when no request is left, while the thread that served the last may still be sending
    `100 Continue` for the next."""
    channel = _Channel.__new__(_Channel)
    answer = OverflowableBuffer(100)
    answer.append(b"x" * 25)
    channel.outbuf_lock, channel.outbufs, channel.total_outbufs_len = threading.Condition(), [answer], 25
    channel.sendbuf_len, channel.send = 100, Mock(return_value=25)
    flushing = threading.Thread(target=channel._flush_some)
    with channel.outbuf_lock:
        flushing.start()
        flushing.join(0.2)
        answer.skip(25, True)  # the other thread has sent all of it
        channel.total_outbufs_len = 0
    flushing.join(30)
    assert (flushing.is_alive(), channel.send.called) == (False, False)


def test_a_connection_may_take_a_file_besides_its_socket(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 2000))
    raised = Mock()
    monkeypatch.setattr("resource.setrlimit", raised)
    limit = connection_limit()
    raised.assert_called_once_with(resource.RLIMIT_NOFILE, (2000, 2000))
    assert 100 < 2 * limit <= 2000 - 200


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM,),
        (signal.SIGHUP,),
        (signal.SIGTERM, signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGTTIN, signal.SIGTTOU),  # meant for an engine: they do not freeze it
    ],
)
def test_whatever_tells_the_api_to_stop_it_stops_softly(live, tmp_path, numbers):
    port = free_port()
    api = Running("api", live.settings, tmp_path / "api.log", port=port)
    try:
        until(lambda: "listening" in (tmp_path / "api.log").read_text(), what="the API")
        for number in numbers[1:]:
            api.process.send_signal(number)
        assert api.stop(numbers[0]) == 0
        assert "stopped" in (tmp_path / "api.log").read_text()
    finally:
        api.end()


def test_a_call_that_takes_no_body_is_not_made_with_one(live):
    for path in ("/queue/resume", f"/jobs/{live.oid()}/retry"):
        answer = live.http.post(path, json={"maxErrors": 100})
        assert (answer.status_code, answer.json()["detail"]) == (422, "this call takes no body: send it without one")
        assert live.http.post(path, content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415
    assert live.http.post("/queue/resume", json={}).status_code == 200
    uploaded = live.http.post("/upload", params={"x": 1}, files={"file": ("a", b"{}")})
    assert (uploaded.status_code, uploaded.json()["detail"]) == (422, "x: this call takes no parameters")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /queue HTTP/1.1\r\n", b"400"),
        (b"GET /queue HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", b"400"),
        (b"GET http://evil.example/queue HTTP/1.1\r\nHost: localhost\r\n", b"403"),
        (b"GET http://localhost/queue HTTP/1.1\r\nHost: localhost\r\n", b"200"),
        (b"GET /queue HTTP/1.0\r\n", b"403"),
        (b"GET /queue HTTP/1.0\r\nHost: localhost\r\n", b"200"),
        (b"POST /process HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"400"),
        (b"POST /process HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n", b"400"),
        (b"POST /process HTTP/1.2\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n", b"400"),
    ],
)
def test_whom_a_request_is_for_and_where_it_ends_is_never_in_doubt(live, head, status):
    answer = sent(live.port, head + b"Connection: close\r\n\r\n")
    assert answer.split(b" ", 2)[1] == status, answer


@pytest.mark.parametrize(("line", "kept"), [(b"", True), (b"Connection: close\r\n", False)])
def test_an_answer_without_a_body_closes_no_connection(live, line, kept):
    head = b"GET /status/%b HTTP/1.1\r\nHost: localhost\r\n"
    job = live.http.post("/process", json={"fileKeys": [live.objects.upload(io.BytesIO(b"{}"), "kept").key]})
    job_id = next(iter(live.http.get("/jobs", params={"batch": job.json()["batchId"]}).json()["jobs"]))["jobId"]
    until(lambda: live.http.get(f"/status/{job_id}").json()["status"] == "COMPLETED", what="the job")
    ask = head % job_id.encode() + b"If-None-Match: *\r\n" + line + b"\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
        for _ in range(2 if kept else 1):
            connection.sendall(ask)
            assert connection.recv(65536).startswith(b"HTTP/1.1 304 ")
        if not kept:
            assert connection.recv(1) == b""


def test_a_call_that_takes_no_parameters_is_not_made_with_some(live):
    key = live.objects.upload(io.BytesIO(b"{}"), "plain").key
    answer = live.http.post(f"/process/{key}", params={"validate": "true"})
    assert (answer.status_code, answer.json()["detail"]) == (
        422,
        "validate: this call takes no parameters: its options are fields of a JSON body",
    )
    assert live.http.get("/queue", params={"x": 1}).status_code == 422
    twice = live.http.get("/jobs", params={"status": ["COMPLETED", "FAILED"]})
    assert (twice.status_code, "this parameter only once" in twice.json()["detail"]) == (422, True)
    assert live.http.get("/healthz", params={"at": 1}).status_code == 200


def test_a_bucket_that_cannot_be_used_stands_in_the_log_from_the_start(live, tmp_path):
    for name in ("api", "engine"):
        log = tmp_path / f"{name}.log"
        running = Running(
            name, live.settings, log, port=free_port(), aws_bucket_name="no-such-bucket", engine_workers=2
        )
        try:
            until(lambda log=log: "S3 cannot be used for now" in log.read_text(), what=f"the warning of the {name}")
            [cause] = [line["cause"] for line in running.lines() if line["event"] == "S3 cannot be used for now"]
            assert cause.startswith("there is no bucket no-such-bucket")
            assert running.stop() == 0
        finally:
            running.end()


@pytest.mark.parametrize(
    ("method", "path", "status"), [("WEBSOCKET", "/queue", 400), ("GET", "/nothing", 404), ("GET", "/queue", 200)]
)
def test_every_answer_has_the_id_that_the_log_has_and_the_headers_of_security(live, method, path, status):
    """Falcon refuses its own methods before any middleware has seen the request."""
    answer = live.http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    request_id = answer.headers["X-Request-ID"]
    assert len(request_id) == 26
    if status >= 400:
        assert answer.json()["requestId"] == request_id
        until(lambda: request_id in live.log(), what="the line of the log")
