"""`headrace load` on real servers: files, objects and streams are uploaded and loaded, even after interruptions."""

import io
import json
import os
import re
import signal
import subprocess
import time
import uuid

import pytest

from api.client import Client
from engine.errors import CommandError
from tests.api.conftest import counted, watching
from tests.running import until


def test_load_and_wait_shows_the_way_and_ends_as_the_job_did(run, file, live):
    done = run("load", file, "--wait", "--collection", "cli")
    assert "COMPLETED" in done.err
    [status] = json.loads(run("load", file, "--wait", "--json", "--collection", "cli").out)
    assert (status["status"], status["progress"]["duplicates"], status["progress"]["rejected"]) == (
        "COMPLETED",
        5000,
        1,
    )
    failed = run("load", file, "--wait", "--max-errors", "0", "--collection", "cli", code=3)
    assert "maxErrors" in failed.err


def test_several_files_objects_and_standard_input_load_at_once(run, file, live, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a line\n")
    key = live.objects.upload(io.BytesIO(b'{"a":1}\n'), f"cli/{uuid.uuid4().hex}.ndjson").key
    here = f"s3://{live.bucket}/{key}"
    done = run(
        "load", file, other, here, "-", "--wait", "--json", "--collection", "several", stdin=b'{"from":"stdin"}\n'
    )
    statuses = json.loads(done.out)
    assert [status["progress"]["inserted"] for status in statuses] == [5000, 1, 1, 1]
    assert statuses[2]["fileKey"] == key
    assert "reads only bucket" in run("load", "s3://elsewhere/key", code=1).err


def test_a_dry_run_writes_nothing(run, file, live):
    [status] = json.loads(run("load", file, "--wait", "--json", "--validate", "--collection", "clidry").out)
    assert (status["validate"], status["progress"]["inserted"]) == (True, 5000)
    assert live.data["clidry"].count_documents({}) == 0


def test_what_is_loaded_is_not_uploaded_again(run, file, live):
    def load(*options):
        [status] = json.loads(run("load", file, "--wait", "--json", "--collection", "twice", *options).out)
        return status

    first, again, skipped = load(), load(), load("--skip-loaded")
    assert {first["fileKey"]} == {again["fileKey"], skipped["fileKey"]}
    assert len({first["jobId"], again["jobId"], skipped["jobId"]}) == 3
    assert (again["alreadyLoadedBy"], again["progress"]["duplicates"]) == (first["jobId"], 5000)
    assert skipped["progress"]["lines"] == 0
    assert live.data["twice"].count_documents({}) == 5000
    forced = load("--force")
    assert (forced["fileKey"], forced["progress"]["inserted"]) == (first["fileKey"], 5000)
    live.objects.delete(first["fileKey"])
    anew = load()
    assert anew["fileKey"] != first["fileKey"]
    file.write_bytes(b'{"n":1}\n')
    assert load()["fileKey"] != anew["fileKey"]


@pytest.mark.parametrize("way", [[], ["--through-api"]])
def test_an_object_that_was_replaced_by_one_of_its_size_is_uploaded_anew(run, file, live, way):
    def load():
        [status] = json.loads(run("load", file, "--wait", "--json", "--collection", "replaced", *way).out)
        return status["fileKey"]

    key = load()
    assert load() == key
    live.objects.upload(io.BytesIO(b"x" * file.stat().st_size), key)
    assert load() != key


def test_a_file_that_was_replaced_by_one_of_its_size_and_time_is_uploaded_anew(run, live, tmp_path):
    path, other = tmp_path / "stamped.ndjson", tmp_path / "other.ndjson"
    path.write_bytes(b'{"n":1}\n')
    other.write_bytes(b'{"n":2}\n')
    found = path.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))

    def load():
        [status] = json.loads(run("load", path, "--wait", "--json", "--collection", "stamped").out)
        return status["fileKey"]

    first = load()
    [note] = tmp_path.glob("headrace/loads/*[0-9a-f]")
    other.replace(path)
    second = load()
    assert second != first
    # A note of an earlier version has another stamp and is ignored.
    note.write_text(json.dumps(json.loads(note.read_bytes()) | {"stamp": [8, found.st_mtime_ns]}))
    assert load() not in (first, second)


def test_files_that_were_not_loaded_for_long_are_forgotten(run, file, tmp_path):
    run("load", file, "--collection", "cli")
    [note] = tmp_path.glob("headrace/loads/*[0-9a-f]")
    old = note.with_name("old")
    old.write_text("{}")
    os.utime(old, (time.time() - 31 * 86400,) * 2)
    run("load", file, "--collection", "cli")
    assert list(tmp_path.glob("headrace/loads/*[0-9a-f]")) == [note]


def test_a_load_may_wait_for_its_time(run, file):
    job_id = run("load", file, "--run-at", "2099-01-01T00:00:00z", "--timeout-seconds", "9").out.strip()
    assert json.loads(run("cancel", job_id, "--json").out)["runAt"] == "2099-01-01T00:00:00.000Z"


HELD = """
import sys

import api.cli
from api.commands.transfer import Transfer

put = Transfer._put


def first(self, number, *given):
    if number > 1:
        self._stopped.wait(120)
    return put(self, number, *given)


Transfer._put = first
sys.argv[0] = "headrace"
api.cli.main()
"""
"""`headrace` that sends the first part of an upload only, until it is interrupted."""


def test_a_load_that_was_interrupted_goes_on_where_it_was(run, live, tmp_path, start):
    path = tmp_path / "large.ndjson"
    line = b'{"text":"%s"}\n' % (b"x" * 1000)
    path.write_bytes(line * 60_000)
    process = start("load", path, "--collection", "resumed", "--wait", code=HELD)

    def noted():
        for note in tmp_path.glob("headrace/loads/*[0-9a-f]"):
            return json.loads(note.read_bytes() or b"{}").get("uploadId")
        return None

    upload = until(noted, what="the note of the upload")
    until(lambda: live.http.get(f"/uploads/{upload}").json().get("stored"), what="the first part")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, said
    assert "interrupted" in said
    before = {part["partNumber"] for part in live.http.get(f"/uploads/{upload}").json()["stored"]}
    assert before == {1}
    [status] = json.loads(run("load", path, "--collection", "resumed", "--wait", "--json").out)
    assert status["progress"]["inserted"] == 60_000
    assert live.http.get(f"/uploads/{upload}").status_code == 404  # the same upload, completed
    assert live.objects.head(status["fileKey"]).size == path.stat().st_size


def test_an_upload_whose_completion_was_not_heard_of_is_not_sent_again(run, file, live, tmp_path):
    [first] = json.loads(run("load", file, "--wait", "--json", "--collection", "unheard").out)
    [note] = tmp_path.glob("headrace/loads/*[0-9a-f]")
    known = json.loads(note.read_bytes())
    del known["key"]  # noted only once the answer has arrived
    note.write_text(json.dumps(known))
    [second] = json.loads(run("load", file, "--wait", "--json", "--collection", "unheard").out)
    assert second["fileKey"] == first["fileKey"]
    assert second["status"] == "COMPLETED"


def test_a_name_that_is_no_text_is_loaded_as_any_other(run, file, tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9.ndjson"
    with open(odd, "wb") as content:  # noqa: PTH123 (a path of bytes)
        content.write(b'{"n":1}\n')
    told = json.loads(run("load", os.fsdecode(odd), file, "--wait", "--json", "--collection", "odd").out)
    assert [load["status"] for load in told] == ["COMPLETED", "COMPLETED"]
    assert told[0]["file"].endswith("caf\ufffd.ndjson")


def test_one_file_that_fails_does_not_keep_the_others_and_both_are_told(run, file, live, tmp_path):
    (tmp_path / "zipped.ndjson").write_bytes(b"\x1f\x8b\x08\x00")
    told = json.loads(run("load", file, "zipped.ndjson", "--wait", "--json", "--collection", "mixed", code=3).out)
    assert [load["status"] for load in told] == ["COMPLETED", "FAILED"]
    missing = "s3://" + live.bucket + "/never/was.ndjson"
    done = run("load", file, missing, "--collection", "mixed", code=1)
    [job_id] = done.out.split()
    assert len(job_id) == 24
    assert done.err.count("never/was.ndjson") >= 1


def test_a_wrong_option_is_told_before_anything_is_uploaded(run, file, live):
    before = live.store.uploads.count_documents({})
    for wrong in (["--format", "csv"], ["--max-errors", "5x"], ["--collection", "system.x"]):
        run("load", file, *wrong, code=2)
    run("load", "-", "--through-api", code=2)
    assert live.store.uploads.count_documents({}) == before


def test_what_comes_through_a_pipe_that_can_be_read_once_is_loaded(run, live, tmp_path):
    pipe = tmp_path / "pipe.ndjson"
    os.mkfifo(pipe)
    writer = subprocess.Popen(["sh", "-c", f"printf '{{\"n\":1}}\\n{{\"n\":2}}\\n' > '{pipe}'"])
    [status] = json.loads(run("load", pipe, "--wait", "--json", "--collection", "piped").out)
    assert writer.wait(30) == 0
    assert status["progress"]["inserted"] == 2
    assert live.data["piped"].count_documents({}) == 2


@pytest.mark.parametrize("over", [False, True])
def test_a_load_that_was_interrupted_at_its_job_makes_no_second_one(run, live, tmp_path, start, over):
    path, name = tmp_path / "watched.ndjson", f"watched-{over}"
    path.write_bytes(b'{"n":1}\n' * 3000)
    run("pause")
    try:
        process = start("load", path, "--collection", name, "--wait")
        watching(process)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 130
    finally:
        run("resume")
    job_id = re.search(r"headrace status ([0-9a-f]{24}) --wait", said)[1]
    if over:
        until(lambda: live.http.get(f"/status/{job_id}").json()["status"] == "COMPLETED", what="the end of the job")
    done = run("load", path, "--collection", name, "--wait", "--json")
    [status] = json.loads(done.out)
    assert status["jobId"] == job_id
    assert "run the same command again" in done.err or not over
    assert (status["status"], live.data[name].count_documents({})) == ("COMPLETED", 3000)
    # Its end has been reported: the next load of the file makes a new job.
    [again] = json.loads(run("load", path, "--collection", name, "--wait", "--json").out)
    assert again["jobId"] != job_id


def test_a_load_that_was_interrupted_at_a_job_that_was_cancelled_makes_another(run, live, tmp_path, start):
    path = tmp_path / "cancelled.ndjson"
    path.write_bytes(b'{"n":1}\n' * 3000)
    run("pause")
    try:
        process = start("load", path, "--collection", "cancelled", "--wait")
        watching(process)
        job = live.store.jobs.find_one({"options.collection": "cancelled"})
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        run("cancel", str(job["_id"]))
    finally:
        run("resume")
    [status] = json.loads(run("load", path, "--collection", "cancelled", "--wait", "--json").out)
    assert status["jobId"] != str(job["_id"])
    assert (status["status"], live.data["cancelled"].count_documents({})) == ("COMPLETED", 3000)


def unfinished(live):
    return live.s3.list_multipart_uploads(Bucket=live.bucket).get("Uploads", [])


def sent(live, before):
    """Whether an upload that is not among those `before` has a part: none is on its way to S3 then."""
    which = [
        {name: upload[name] for name in ("Key", "UploadId")} for upload in unfinished(live) if upload not in before
    ]
    return any(live.s3.list_parts(Bucket=live.bucket, **upload).get("Parts") for upload in which)


def test_standard_input_that_is_broken_off_leaves_no_upload(live, start):
    before, asked = unfinished(live), counted(live, "GET", "/files", 200)
    process = start("load", "s3://nowhere/file", "-", "--collection", "broken", stdin=subprocess.PIPE)
    process.stdin.write(b'{"n":1}\n' * 3_000_000)
    process.stdin.flush()
    until(lambda: sent(live, before), what="the upload")
    until(lambda: counted(live, "GET", "/files", 200) > asked, what="the look at the bucket")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert "nothing of it is kept" in said
    assert "s3://nowhere/file: this API reads only bucket" in said  # what went wrong before the interrupt
    assert process.returncode == 130
    assert unfinished(live) == before
    assert live.store.jobs.count_documents({"options.collection": "broken"}) == 0


def test_an_interrupt_after_the_end_of_a_stream_tells_of_the_job_that_is_made(run, live, start, tmp_path):
    run("pause")  # it must not end before the interrupt
    try:
        process = start("load", "-", "--collection", "unwatched", "--wait", stdin=subprocess.PIPE)
        process.stdin.write(b'{"n":1}\n' * 2_000_000)
        process.stdin.close()
        process.stdin = None
        until(lambda: live.store.jobs.count_documents({"options.collection": "unwatched"}), what="the job")
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1].decode()
    finally:
        run("resume")
    [job] = live.store.jobs.find({"options.collection": "unwatched"})
    assert process.returncode == 130
    assert f"headrace status {job['_id']} --wait" in told


@pytest.mark.parametrize("change", [b"", b"appended"])
def test_a_file_that_is_written_to_while_it_goes_through_the_api_is_told(live, monkeypatch, tmp_path, change):
    path = tmp_path / "f.ndjson"
    path.write_bytes(b'{"n":1}\n' * 100_000)
    os.utime(path, (1, 1))
    client = Client(f"http://127.0.0.1:{live.port}")
    monkeypatch.setattr(client, "_http", live.http)
    ask = client.ask

    def change_it(*given, **more):
        with path.open("ab" if change else "r+b") as file:
            file.write(change or b'{"n":2}\n')
        return ask(*given, **more)

    monkeypatch.setattr(client, "ask", change_it)
    with pytest.raises(CommandError, match=r"f\.ndjson was written to while it was sent"):
        client.upload(path)


def test_a_file_that_two_commands_load_at_once_is_loaded_once(live, tmp_path, start):
    path = tmp_path / "both.ndjson"
    path.write_bytes(b'{"n":1}\n' * 30_000)
    both = [start("load", path, "--collection", "both", "--wait") for _ in range(2)]
    for process in both:
        said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 0, said
    assert live.data["both"].count_documents({}) == 30_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stream_that_is_broken_off_leaves_nothing_in_s3(live, tmp_path, start, number):
    before = unfinished(live)  # those of other tests
    process = start("load", "-", stdin=subprocess.PIPE)
    process.stdin.write(b'{"n":1}\n' * 3_000_000)  # more than one part
    process.stdin.flush()
    until(lambda: sent(live, before), what="the upload")
    process.send_signal(number)
    said = process.stderr.read().decode()
    assert (process.wait(30), "interrupted; standard input" in said) == (130, True), said
    assert unfinished(live) == before


def test_a_file_that_goes_through_the_api_shows_its_way(run, file):
    done = run("load", file, "--through-api", "--collection", "through")
    assert "uploading" in done.err
