"""Waiting for a job, on an API over real servers: ETags, long polls, event streams, and the limit on watchers."""

import io
import re
import resource
import socket
import threading
import time
import uuid
from contextlib import ExitStack

import falcon.testing
import httpx
import orjson
import pytest

from api.limits import Slots
from api.problems import Problem
from api.watch import EVENTS_SECONDS, HEARTBEAT_SECONDS, Events, Watch, _Stream, tag_of
from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.errors import Transient
from engine.ports import free_port
from tests.api.conftest import answers as ready
from tests.api.conftest import slow_inserts
from tests.running import Running, until


@pytest.fixture
def waiting(live):
    """The id of a job that stays PENDING during the test: its time has not come."""
    key = live.objects.upload(io.BytesIO(b"{}\n"), f"w/{uuid.uuid4().hex}.ndjson").key
    job_id = live.http.post(f"/process/{key}", json={"runAt": "2099-01-01T00:00:00Z"}).json()["jobId"]
    yield job_id
    live.http.post(f"/jobs/{job_id}/cancel")


@pytest.mark.parametrize("path", ["/status/{}", "/jobs/{}"])
def test_what_has_not_changed_is_not_sent_again(live, waiting, path):
    first = live.http.get(path.format(waiting))
    again = live.http.get(path.format(waiting), headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    live.http.post(f"/jobs/{waiting}/cancel")
    changed = live.http.get(path.format(waiting), headers={"If-None-Match": first.headers["ETag"]})
    assert (changed.status_code, changed.json()["status"]) == (200, "CANCELLED")


@pytest.mark.parametrize("path", ["/status/{}", "/jobs/{}"])
def test_a_long_poll_answers_when_the_job_moves(live, waiting, path):
    path = path.format(waiting)
    tag = live.http.get(path).headers["ETag"]
    threading.Timer(1, lambda: live.http.post(f"/jobs/{waiting}/cancel")).start()
    answer = live.http.get(path, headers={"Prefer": "wait=20", "If-None-Match": tag})
    assert (answer.status_code, answer.json()["status"]) == (200, "CANCELLED")
    assert answer.headers["Preference-Applied"] == "wait=20"


def test_a_long_poll_ends_when_its_time_is_over(live, waiting):
    answer = live.http.get(f"/status/{waiting}", headers={"Prefer": "respond-async, wait=1"})
    assert (answer.status_code, answer.json()["status"]) == (200, "PENDING")


def test_events_tell_the_progress_to_its_end(live):
    data = b"".join(b'{"n":%d}\n' % n for n in range(150_000))
    key = live.objects.upload(io.BytesIO(data), f"w/{uuid.uuid4().hex}.ndjson").key
    events = []
    with ExitStack() as stack:
        stack.enter_context(slow_inserts(live, 200))
        job_id = live.http.post(f"/process/{key}", json={"collection": "events"}).json()["jobId"]
        answer = stack.enter_context(live.http.stream("GET", f"/jobs/{job_id}/events"))
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                events.append([line.removeprefix("event: ")])
            elif line.startswith("data: "):
                events[-1].append(orjson.loads(line.removeprefix("data: ")))
    assert events[-1][0] == "end"
    assert events[-1][1]["status"] == "COMPLETED"
    assert {name for name, _ in events[:-1]} == {"progress"}
    lines = [body["progress"]["lines"] for _, body in events]
    assert lines == sorted(lines)


class Still:
    """Watches a job whose status is `body`, or cannot be read."""

    def __init__(self, body, slots):
        self.body, self.slots, self.stopping = body, slots, threading.Event()

    def status(self, job_id):
        if isinstance(self.body, Exception):
            raise self.body
        return self.body, False


def streamed(watch, monkeypatch, *, now=(0.0,)):
    """A stream whose clock shows `now` at its creation, and goes on by a second with each look at the job."""
    clock = [*now]
    monkeypatch.setattr("api.watch.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(watch.stopping, "wait", lambda seconds: clock.__setitem__(0, clock[0] + 1))
    return _Stream(watch, "job", tag_of(watch.body) if isinstance(watch.body, dict) else "", lambda: False), clock


def test_a_stream_without_news_is_written_to_now_and_then_and_ends_after_a_while(monkeypatch):
    """Only a write reveals that a client's machine has vanished, and each holds the place of another."""
    slots = Slots(1, 429, "watchers")
    slots.take()
    stream, clock = streamed(Still({"status": "PENDING", "progress": {}}, slots), monkeypatch)
    assert next(stream).startswith(b"retry: ")
    times = []
    for piece in stream:
        assert piece == b": still here\n\n"
        times.append(clock[0])
    assert times[0] == HEARTBEAT_SECONDS
    assert times[1] - times[0] == HEARTBEAT_SECONDS
    assert EVENTS_SECONDS - HEARTBEAT_SECONDS <= times[-1] <= EVENTS_SECONDS <= clock[0] <= EVENTS_SECONDS + 1
    stream.close()
    stream.close()
    slots.take()
    with pytest.raises(Problem):
        slots.take()


def test_a_stream_whose_job_cannot_be_read_says_so_and_ends(monkeypatch):
    stream, _ = streamed(Still(Transient("MongoDB does not answer"), Slots(1, 429, "watchers")), monkeypatch)
    assert next(stream).startswith(b"retry: ")
    told = next(stream)
    assert told.startswith(b"event: failed\ndata: ")
    assert orjson.loads(told.removeprefix(b"event: failed\ndata: ")) == {
        "code": Transient.code,
        "detail": "MongoDB does not answer",
    }
    assert list(stream) == []


def test_a_stream_goes_on_where_the_last_one_was(live, waiting):
    def first(known):
        """The beginning of a stream: the delay before reconnecting, and the first event."""
        pieces = b""
        with live.http.stream("GET", f"/jobs/{waiting}/events", headers={"Last-Event-ID": known}) as answer:
            for piece in answer.iter_raw():
                pieces += piece
                if pieces.count(b"\n\n") >= 2:
                    return pieces
        return pieces

    told = first("")
    assert told.startswith(b"retry: 3000\n\n")
    tag = re.search(rb"id: (\w+)\nevent: progress\n", told)[1].decode()
    threading.Timer(1, lambda: live.http.post(f"/jobs/{waiting}/cancel")).start()
    told = first(tag)
    assert b"event: end\n" in told  # and not the progress that the client already has
    end = re.search(rb"id: (\w+)", told)[1].decode()
    assert live.http.get(f"/jobs/{waiting}/events", headers={"Last-Event-ID": end}).status_code == 204
    assert live.http.get(f"/jobs/{waiting}/events", headers={"Last-Event-ID": tag}).status_code == 200


def test_a_stream_holds_nothing_for_a_client_that_has_left(live, waiting):
    slots = Slots(1, 429, "waits")
    app = falcon.App()
    queue = Queue(live.store, Ledger(live.store, live.settings.engine_lease_seconds))
    app.add_route("/jobs/{job_id}/events", Events(Watch(queue, slots, threading.Event())))
    left = threading.Event()
    asked = falcon.testing.create_environ(f"/jobs/{waiting}/events") | {"waitress.client_disconnected": left.is_set}
    told = app(asked, falcon.testing.StartResponseMock())
    assert b"progress" in [next(told) for _ in range(2)][1]
    with pytest.raises(Problem):
        slots.take()
    left.set()
    assert list(told) == []
    told.close()  # as a server does
    slots.take()


def test_a_stop_waits_for_nobody_who_watches(live, waiting, tmp_path):
    port, answers = free_port(), []
    api = Running("api", live.settings, tmp_path / "api.log", port=port, api_max_watchers=2)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until(lambda: ready(http), what="the API's first answer")

            def follow(path, headers):
                while (answer := http.get(path, headers=headers)).status_code == 429:  # to whoever looks below
                    time.sleep(0.05)
                answers.append(answer)

            asked = {f"/status/{waiting}": {"Prefer": "wait=50"}, f"/jobs/{waiting}/events": {}}
            watchers = [threading.Thread(target=follow, args=(path, headers)) for path, headers in asked.items()]
            for watcher in watchers:
                watcher.start()
            look = {"Prefer": "wait=1"}
            until(lambda: http.get(f"/status/{waiting}", headers=look).status_code == 429, what="two who watch")
            assert api.stop() == 0
            for watcher in watchers:
                watcher.join(30)
    finally:
        api.end()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert "PENDING" in answers[0].text
    assert "PENDING" in answers[1].text
    assert "Traceback" not in api.log.read_text()


def test_a_long_poll_is_asked_for_in_any_case_of_letters_and_a_star_knows_whatever_there_is(live, waiting):
    assert live.http.get(f"/status/{waiting}", headers={"If-None-Match": "*"}).status_code == 304
    answer = live.http.get(f"/status/{waiting}", headers={"Prefer": "WAIT=1", "If-None-Match": "*"})
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (304, "wait=1")


def test_a_thousand_watchers_do_not_stop_an_upload(live, waiting):
    request = f"GET /jobs/{waiting}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))  # of this process, which holds all the watchers
    lines = []
    try:
        for _ in range(1000):
            line = socket.create_connection(("127.0.0.1", live.port), timeout=60)
            line.sendall(request)
            lines.append(line)
        stored = live.http.post("/upload", files={"file": ("a.ndjson", b'{"n":1}\n' * 100_000)})
        assert stored.status_code == 201
        assert live.http.get("/healthz").status_code == 200
        answers = [line.recv(4096).split(b" ", 2)[1] for line in lines]
    finally:
        for line in lines:
            line.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(answers) == {b"200", b"429"}
    assert answers.count(b"200") <= live.settings.api_max_watchers
    until(
        lambda: live.http.get(f"/status/{waiting}", headers={"Prefer": "wait=1"}).status_code == 200, what="room again"
    )


def test_a_crowd_of_watchers_is_bounded_and_an_upload_goes_through(live, waiting):
    statuses, lock = [], threading.Lock()
    begun = threading.Barrier(101)

    def follow(number):
        with httpx.Client(base_url=live.http.base_url, timeout=60) as http:
            begun.wait()
            if number % 2:
                with http.stream("GET", f"/jobs/{waiting}/events") as answer:
                    with lock:
                        statuses.append((answer.status_code, answer.headers.get("Retry-After")))
                    if answer.status_code == 200:
                        time.sleep(10)  # so that all have asked before one leaves, even on a busy machine
            else:
                answer = http.get(f"/status/{waiting}", headers={"Prefer": "wait=10"})
                with lock:
                    statuses.append((answer.status_code, answer.headers.get("Retry-After")))

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    begun.wait()
    time.sleep(0.5)
    stored = live.http.post("/upload", files={"file": ("a.ndjson", b'{"n":1}\n' * 1000)})
    assert stored.status_code == 201
    assert live.http.get("/healthz").status_code == 200
    for thread in threads:
        thread.join()
    busy = [retry for status, retry in statuses if status == 429]
    assert {status for status, _ in statuses} == {200, 429}
    assert len(busy) >= 84
    assert all(busy)
    # The watchers have left: there is room again, after one heartbeat at the latest.
    end = time.monotonic() + 60
    while live.http.get(f"/status/{waiting}", headers={"Prefer": "wait=1"}).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.5)
