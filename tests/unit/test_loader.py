"""What a load that failed or was interrupted says of each file: what is left of it, and what to do. No servers."""

import io
import threading
from types import SimpleNamespace

import httpx
import orjson
import pytest

from api.commands.loader import STDIN, Loaded, Loader, _Meter
from api.commands.transfer import Transfer
from engine.errors import CommandError
from tests.answering import client_of, problem

NOTED, LOST = SimpleNamespace(kept=True), SimpleNamespace(kept=False)
UPLOADED = {"key": "01K-a.ndjson", "note": NOTED}  # the note lets the same command resume


@pytest.mark.parametrize(
    ("known", "advice"),
    [
        ({"job_id": "6b04", **UPLOADED}, "`headrace status 6b04 --wait`"),
        ({"job_id": "6b04", "by_hand": "submit it"}, "`headrace status 6b04 --wait`"),
        (UPLOADED, "run the same command again, which creates no second one"),
        ({"file": "s3://b/k", "note": NOTED}, "run the same command again, which creates no second one"),
        ({"note": NOTED}, "run the same command again to resume it"),
        ({"key": "01K-a.ndjson"}, "`headrace jobs --file 01K-a.ndjson`"),
        ({"key": "01K-a.ndjson", "note": LOST}, "`headrace jobs --file 01K-a.ndjson`"),
        ({"note": LOST}, "cannot be resumed"),
        ({"by_hand": "submit it"}, "look for it with `headrace jobs`; if there is none, submit it"),
        (
            {"by_hand": "submit it", "error": CommandError("the API went away; submit it")},
            "the API went away; submit it",
        ),
        ({}, "run the same command again"),
        ({"file": STDIN}, "nothing of it is kept"),
    ],
)
def test_the_advice_fits_how_far_the_file_had_come(known, advice):
    assert advice in Loaded(**{"file": "a.ndjson"} | known).advice()


def test_only_a_job_that_was_watched_to_its_end_needs_no_advice():
    assert not Loaded("a.ndjson").ended()
    assert not Loaded("a.ndjson", status={"status": "PROCESSING"}).ended()
    assert Loaded("a.ndjson", status={"status": "CANCELLED"}).ended()


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
            return "job of good", "PENDING"

    bad, good = Loader(Api(), {}, wait=False, through_api=False).run([str(tmp_path / "bad"), str(tmp_path / "good")])
    assert "ValueError: odd" in str(bad.error)
    assert (good.error, good.job_id) == (None, "job of good")


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED"])
def test_a_job_that_has_ended_is_that_of_an_earlier_command_only_where_there_was_one(monkeypatch, tmp_path, state):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(Transfer, "file", lambda self, file, note, sent: file.name)
    monkeypatch.setattr(Transfer, "there", lambda self, note, size: note.get("key"))
    (tmp_path / "file").write_bytes(b"{}")
    jobs = {}

    class Api:
        url = "http://api"

        def process(self, key, options, ticket):
            # As if an earlier answer was lost, and the job has ended by the time of this call.
            return jobs.setdefault(ticket, f"job {len(jobs)}"), state

        def states(self, job_id):
            raise CommandError("the watch was broken off")

    def load(wait):
        return Loader(Api(), {}, wait=wait, through_api=False).run([str(tmp_path / "file")])[0]

    broken = load(True)
    assert (broken.job_id, broken.earlier, len(jobs)) == ("job 0", False, 1)
    again = load(False)
    assert (again.job_id, again.earlier) == (("job 0", True) if state == "COMPLETED" else ("job 1", False))
    anew = load(False)
    assert (anew.job_id, anew.earlier) == (f"job {len(jobs) - 1}", False)


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


def test_a_file_that_is_too_large_for_the_api_is_to_go_without_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "file").write_bytes(b"{}")
    client = client_of(lambda request: problem(413, "too_large"))
    [load] = Loader(client, {}, wait=False, through_api=True).run([str(tmp_path / "file")])
    assert str(load.error).endswith("leave out --through-api")


@pytest.mark.parametrize("kind", ["busy", "no_room"])
def test_a_file_for_which_the_api_has_no_room_is_sent_again(monkeypatch, tmp_path, kind):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("api.commands.loader.TURN_SECONDS", 0.001)
    (tmp_path / "file").write_bytes(b'{"n":1}\n')
    asked = []

    def answer(request):
        asked.append(request.url.path)
        if asked.count("/upload") < 3:
            return problem(503, kind)
        done = {"fileKey": "k", "size": 8, "etag": "e"} if request.url.path == "/upload" else {}
        return httpx.Response(201, headers={"X-Request-ID": "r"}, json=done | {"jobId": "job", "status": "PENDING"})

    told = []
    monkeypatch.setattr("api.commands.show.Bars.uploaded", lambda self, task, sent, *more: told.append(sent))
    [load] = Loader(client_of(answer), {}, wait=False, through_api=True).run([str(tmp_path / "file")])
    assert (load.error, load.job_id, asked.count("/upload")) == (None, "job", 3)
    # Twice it counts for nothing that the form of three reads was sent.
    assert told.count(0) == 2
    assert told[-1] == 8
    asked.clear()
    monkeypatch.setattr("api.commands.loader.PATIENCE_SECONDS", -1)
    (tmp_path / "another").write_bytes(b'{"n":2}\n')
    [load] = Loader(client_of(answer), {}, wait=False, through_api=True).run([str(tmp_path / "another")])
    assert str(load.error).startswith(f"it is {kind}")
    assert asked == ["/upload"]


def test_a_file_whose_upload_may_have_been_stored_is_not_sent_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "file").write_bytes(b"{}")
    asked = []
    client = client_of(lambda request: asked.append(request.url.path) or problem(503, "unavailable"))
    [load] = Loader(client, {}, wait=False, through_api=True).run([str(tmp_path / "file")])
    assert "it is unavailable" in str(load.error)
    assert asked == ["/upload"]


def test_a_command_that_failed_for_one_file_loads_the_others_no_second_time_when_run_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(Transfer, "there", lambda self, note, size: note.get("key"))
    broken, jobs, lock = ["bad"], {}, threading.Lock()

    def send(self, file, note, sent):
        if file.name in broken:
            raise CommandError("no")
        return file.name

    monkeypatch.setattr(Transfer, "file", send)

    class Api:
        url = "http://api"

        def process(self, key, options, ticket):
            with lock:
                return jobs.setdefault(ticket, f"job {len(jobs)}"), "COMPLETED"

    def load():
        names = [str(tmp_path / name) for name in ("good", "bad")]
        return [each.job_id for each in Loader(Api(), {"force": True}, wait=False, through_api=False).run(names)]

    for name in ("good", "bad"):
        (tmp_path / name).write_bytes(b"{}")
    assert load() == ["job 0", None]
    assert load() == ["job 0", None]
    broken.clear()
    assert load() == ["job 0", "job 1"]
    assert set(load()) == {"job 2", "job 3"}  # that command was done: this is another one


def test_files_are_sent_however_long_the_jobs_of_others_take(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    all_sent, sent = threading.Event(), []

    def send(self, file, note, count):
        sent.append(file.name)
        if len(sent) == 9:
            all_sent.set()
        return file.name

    monkeypatch.setattr(Transfer, "file", send)
    monkeypatch.setattr(Transfer, "there", lambda self, note, size: None)

    class Api:
        url = "http://api"

        def process(self, key, options, ticket):
            return key, "PENDING"

        def states(self, job_id):
            assert all_sent.wait(30)
            raise CommandError("seen enough")

    names = [tmp_path / f"f{n}" for n in range(9)]
    for name in names:
        name.write_bytes(b"{}")
    loads = Loader(Api(), {}, wait=True, through_api=False).run(list(map(str, names)))
    assert {str(load.error) for load in loads} == {"seen enough"}


def test_the_rate_of_an_upload_is_that_of_its_latest_parts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("api.commands.loader.time.monotonic", lambda: now[0])
    meter = _Meter()
    meter.add(10**9)  # parts that S3 had already
    for _ in range(40):
        now[0] += 1
        count, rate = meter.add(5)
    assert (count, rate) == (10**9 + 200, 5.0)


def test_the_error_of_a_file_whose_name_is_no_text_can_be_printed_as_json():
    load = Loaded("caf\udce9", error=CommandError("caf\udce9 was written to"))
    assert orjson.loads(orjson.dumps(load.summary()))["error"]["message"] == "caf\ufffd was written to"


def test_a_command_of_which_a_job_failed_loads_the_others_no_second_time_when_run_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(Transfer, "file", lambda self, file, note, sent: file.name)
    monkeypatch.setattr(Transfer, "there", lambda self, note, size: note.get("key"))
    jobs, lock, failing = {}, threading.Lock(), ["bad"]

    class Api:
        url = "http://api"

        def process(self, key, options, ticket):
            with lock:
                job = jobs.setdefault(ticket, f"{key} {len(jobs)}")
            return job, "FAILED" if key in failing else "COMPLETED"

        def states(self, job_id):
            progress = dict.fromkeys(
                ("percent", "lines", "rejected", "recordsPerSecond", "bytesDone", "secondsLeft"), 0
            )
            state = "FAILED" if job_id.split()[0] in failing else "COMPLETED"
            yield {"status": state, "progress": progress, "runAt": None}

    def load():
        names = [str(tmp_path / name) for name in ("good", "bad")]
        return [each.job_id for each in Loader(Api(), {"force": True}, wait=True, through_api=False).run(names)]

    for name in ("good", "bad"):
        (tmp_path / name).write_bytes(b"{}")
    good, bad = load()
    failing.clear()  # somebody has retried it, and it went well
    again = load()
    assert again == [good, bad]
    assert not set(load()) & {good, bad}


def test_a_command_that_waited_for_another_has_its_job(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(Transfer, "file", lambda self, file, note, sent: note.stored({"fileKey": "k", "etag": "e"}))
    monkeypatch.setattr(Transfer, "there", lambda self, note, size: note.get("key"))
    begun, waits, jobs = threading.Event(), threading.Event(), {}
    monkeypatch.setattr("api.commands.loader.plainly", lambda text: waits.set())
    (tmp_path / "f").write_bytes(b"{}")

    class Api:
        url = "http://api"

        def process(self, key, options, ticket):
            begun.set()
            assert waits.wait(30)
            return jobs.setdefault(ticket, f"job {len(jobs)}"), "PENDING"

    def load():
        [found] = Loader(Api(), {"force": True}, wait=False, through_api=False).run([str(tmp_path / "f")])
        assert found.error is None
        found_jobs.append(found.job_id)

    found_jobs = []
    both = [threading.Thread(target=load) for _ in range(2)]
    both[0].start()
    assert begun.wait(30)
    both[1].start()
    for each in both:
        each.join(60)
    assert found_jobs == ["job 0", "job 0"]
