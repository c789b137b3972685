"""Streams and files on their way to S3 arrive whole or not at all, whatever the other side does. No servers."""

import io
import os
import threading
import time

import httpx
import pytest

from api.client import CallFailed
from api.commands import transfer as module
from api.commands.notes import Note
from api.commands.transfer import Transfer, _exactly
from engine.errors import CommandError


class Api:
    """Answers as the HTTP API does, and records the calls. An upload may have `parts` parts of `part_bytes` each."""

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
            "etag": "e",
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

    def put(self, number, url, data, state, sent):
        parts[url] = data

    monkeypatch.setattr(Transfer, "_put", put)
    monkeypatch.setattr(module, "LAST_CALL_SECONDS", 0.01)
    return parts


@pytest.mark.parametrize(("part_bytes", "most"), [(8, 4), (20 * 2**20, 3), (105 * 2**20, 1)])
def test_no_more_than_some_bytes_of_large_parts_are_held(monkeypatch, part_bytes, most):
    under_way, seen, lock = [0], [], threading.Lock()

    def put(self, number, url, data, state, sent):
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
            # The end is read twice: by the part that it cuts short, and by the empty one after it.
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
def test_a_stream_is_whole_or_broken_off_and_never_something_between(late, monkeypatch):
    if not late:
        monkeypatch.setattr(module, "LAST_CALL_SECONDS", 30)
    api, wholes = Api(), []
    transfer = Transfer(api)

    def whole(by_hand):
        wholes.append(by_hand)
        if late:  # the stop comes once the end is trusted: it has to wait, and undoes nothing
            stopper = threading.Thread(target=transfer.stop)
            stopper.start()
            stops.append(stopper)

    stops = []
    if late:
        assert transfer.stream(io.BytesIO(), "s", lambda n: None, whole) == "k"
        stops[0].join()
        assert api.asked == ["POST /uploads", "POST /uploads/u/complete"]
    else:
        stopper = threading.Timer(0.05, transfer.stop)  # while the end of the stream is not trusted yet
        stopper.start()
        with pytest.raises(CommandError):
            transfer.stream(io.BytesIO(), "s", lambda n: None, whole)
        stopper.join()
        assert wholes == []
        assert "POST /uploads/u/complete" not in api.asked
        assert "DELETE /uploads/u" in api.asked


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

    def put(self, number, url, data, state, sent):
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


@pytest.mark.parametrize(
    ("status", "said", "tries"),
    [(400, "<Code>RequestTimeout</Code>", 2), (503, "<Code>SlowDown</Code>", 2), (400, "<Code>BadDigest</Code>", 1)],
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
        with pytest.raises(
            CommandError, match=r"answered with 400 \(BadDigest\): run the same command again to continue"
        ):
            transfer._put(1, "http://s3/1", b"data", {"headers": {}, "size": 4}, sent.append)
    else:
        transfer._put(1, "http://s3/1", b"data", {"headers": {}, "size": 4}, sent.append)
    assert (asked, sent) == ([b"data"] * tries, [4] * (tries - 1))


@pytest.mark.parametrize("helps", [True, False])
def test_a_url_that_is_refused_is_signed_anew_once(monkeypatch, helps):
    """It may have expired, for example while the machine slept."""
    refused, asked, sent, api = httpx.Response(403, text="<Code>AccessDenied</Code>"), [], [], Api(parts=3)

    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(200) if helps and len(asked) == 2 else refused

    transfer = Transfer(api)
    monkeypatch.setattr(transfer, "_http", httpx.Client(transport=httpx.MockTransport(answer)))
    state = {"uploadId": "u", "headers": {}, "size": 4}
    if helps:
        transfer._put(2, "http://s3/old", b"data", state, sent.append)
    else:
        with pytest.raises(CommandError, match=r"answered with 403 \(AccessDenied\)"):
            transfer._put(2, "http://s3/old", b"data", state, sent.append)
    assert (asked, sent) == (["http://s3/old", "http://s3/2"], [4] * helps)
    assert api.asked == ["GET /uploads/u"]


@pytest.mark.parametrize("reached", [False, True])
def test_an_s3_that_goes_away_is_waited_for_where_it_was_there_before(monkeypatch, reached):
    now, asked = [0.0], []

    def answer(request):
        asked.append(request.read())
        if len(asked) == 1 and reached:
            return httpx.Response(200)
        if now[0] < 30:
            raise httpx.ConnectError("refused")
        return httpx.Response(200)

    def wait(seconds):
        now[0] += seconds

    transfer, sent = Transfer(Api()), []
    monkeypatch.setattr(transfer, "_http", httpx.Client(transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(transfer._stopped, "wait", wait)
    monkeypatch.setattr("api.commands.transfer.time.monotonic", lambda: now[0])
    state = {"headers": {}, "size": 8}
    if reached:
        for part in (b"data", b"more"):
            transfer._put(1, "http://s3/1", part, state, sent.append)
        assert sent == [4, 4]
    else:
        with pytest.raises(CommandError, match="--through-api"):
            transfer._put(1, "http://s3/1", b"data", state, sent.append)
        assert (len(asked), now[0] < 10) == (5, True)
    assert set(asked) == ({b"data", b"more"} if reached else {b"data"})


def test_a_stream_whose_part_s3_does_not_take_is_not_said_to_go_on(monkeypatch):
    transfer = Transfer(Api(parts=1))
    refuse = httpx.MockTransport(lambda request: httpx.Response(403))
    monkeypatch.setattr(transfer, "_http", httpx.Client(transport=refuse))
    monkeypatch.setattr(transfer._stopped, "wait", lambda seconds: False)
    with pytest.raises(CommandError, match="nothing of the stream is kept"):
        transfer._put(1, "http://s3/1", b"data", {"uploadId": "u", "headers": {}, "size": None}, lambda n: None)


@pytest.mark.parametrize("change", [b"", b"appended", None])
def test_a_file_that_is_written_to_while_it_is_sent_becomes_no_object(sent, monkeypatch, tmp_path, change):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path, api = tmp_path / "f.ndjson", Api(parts=3)
    path.write_bytes(bytes(20))
    os.utime(path, (1, 1))
    api.state |= {"size": 20, "stored": []}
    monkeypatch.setattr(module, "IN_FLIGHT_BYTES", 8)  # one part at a time
    put = Transfer._put

    def change_it(self, number, url, data, state, sent):
        put(self, number, url, data, state, sent)
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
    # It is of no use any more, so the rest of a large file is not sent for hours.
    assert sum(map(len, sent.values())) == (20 if change is None else 8)


@pytest.mark.parametrize("size", [0, 20])
def test_a_file_that_does_not_have_its_size_is_to_be_piped(sent, monkeypatch, tmp_path, size):
    """As in /proc and /sys."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path, api = tmp_path / "f", Api(parts=3)
    path.write_bytes(b"data")
    api.state |= {"size": size, "stored": []}
    monkeypatch.setattr(module, "version_of", lambda content: (size, 1))
    with pytest.raises(CommandError, match=r"pipe it, as in `cat FILE \| headrace load -`"):
        Transfer(api).file(path, Note(api.url, str(path), [size, 1]), lambda n: None)


@pytest.mark.parametrize(
    ("known", "found", "kept"),
    [
        ({"etag": "e-2"}, {"size": 8, "etag": "e-2"}, True),
        ({"etag": "e-2"}, {"size": 8, "etag": "other"}, False),
        ({}, {"size": 8, "etag": "other"}, True),  # a note of an earlier version has no ETag
        ({}, {"size": 9, "etag": "e-2"}, False),
    ],
)
def test_an_object_that_was_replaced_is_not_taken_for_the_file(monkeypatch, tmp_path, known, found, kept):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    api = Api()
    api.insist = lambda *_: found
    note = Note(api.url, "f", [8])
    note.put(key="k", **known)
    assert Transfer(api).there(note, 8) == ("k" if kept else None)
    assert note.get("key") == ("k" if kept else None)
