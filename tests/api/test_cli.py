"""The command line against a real API: each command, its JSON, its exit code, and a load that goes on where it was."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.running import ROOT, title, until


@pytest.fixture
def run(live, tmp_path):
    """Run a command; returns the finished process."""

    def go(*arguments, code=0, stdin=None, **changes):
        environment = {
            "API_URL": f"http://127.0.0.1:{live.port}",
            "XDG_STATE_HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-m", "api.cli", *map(str, arguments)],
            env={**os.environ, **environment, **changes},
            input=stdin,
            capture_output=True,
            timeout=120,
            cwd=tmp_path,
        )
        done.out, done.err = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, f"exit code {done.returncode}: {done.out}{done.err}"
        assert "Traceback" not in done.err
        return done

    return go


@pytest.fixture
def start(live, tmp_path):
    """Start a command and let it run; whatever is left of it is killed in the end."""
    started = []

    def go(*arguments, stdin=None):
        own = {"API_URL": f"http://127.0.0.1:{live.port}", "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", *map(str, arguments)],
            env=os.environ | own,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            # Whoever runs the tests in the background ignores INT, and so would a child of theirs.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some file.ndjson"
    path.write_bytes(b"".join(b'{"n":%d}\n' % n for n in range(5000)) + b"bad\n")
    return path


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
    assert "reads bucket" in run("load", "s3://elsewhere/key", code=1).err


def test_a_load_without_waiting_prints_the_id_that_the_other_commands_take(run, file, live):
    job_id = run("load", file, "--collection", "cli").out.strip()
    assert json.loads(run("status", job_id, "--wait", "--json").out)["status"] == "COMPLETED"
    assert "COMPLETED" in run("status", job_id).out
    assert job_id in run("jobs", "--limit", "5", COLUMNS="200").out
    assert json.loads(run("jobs", "--json", "--status", "completed", "--collection", "cli").out)["jobs"]
    [reject] = json.loads(run("rejects", job_id, "--json").out)["rejects"]
    assert (reject["line"], reject["raw"]) == (5001, "bad")
    out = file.parent / "bad.ndjson"
    run("rejects", job_id, "--out", out)
    assert out.read_bytes() == b"bad\n"
    link, kept = file.parent / "link", file.parent / "bad.ndjson.part"
    link.symlink_to(out)
    kept.write_text("mine\n")
    out.write_text("old\n")
    out.chmod(0o640)
    run("rejects", job_id, "--out", link)
    assert (out.read_bytes(), link.is_symlink(), kept.read_text()) == (b"bad\n", True, "mine\n")
    assert out.stat().st_mode & 0o777 == 0o640
    pipe = file.parent / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        run("rejects", job_id, "--out", pipe)
        assert read.result() == b"bad\n"
    for impossible in (out / "x", file.parent / ("x" * 300), "/", file.parent / "nowhere" / "x"):
        said = run("rejects", job_id, "--out", impossible, code=1).err
        assert "cannot be written" in said
        assert "unexpected" not in said
    assert sorted(path.name for path in file.parent.glob(".headrace*")) == []
    assert "nothing to cancel" in run("cancel", job_id, code=1).err
    assert "nothing to retry" in run("retry", job_id, code=1).err


def test_the_exit_code_tells_a_cancelled_job(run, file, live):
    run("pause")
    try:
        assert json.loads(run("pause", "--json").out)["paused"] is True
        time.sleep(0.7)
        job_id = run("load", file).out.strip()
        assert json.loads(run("cancel", job_id, "--json").out)["status"] == "CANCELLED"
        run("status", job_id, code=4)
        assert json.loads(run("retry", job_id, "--json").out)["status"] == "PENDING"
    finally:
        assert run("resume").out.splitlines()[0] == "running"
    run("status", job_id, "--wait")


def test_a_watch_tells_what_a_job_waits_for(run, file, start):
    run("pause")
    try:
        time.sleep(0.7)
        watched = start("load", file, "--wait")
        said = b""
        while b"waits for" not in said:
            said += watched.stderr.readline() or pytest.fail(f"the watch ended: {said.decode()}")
        assert b"it is paused" in said
        [job] = json.loads(run("jobs", "--status", "pending", "--limit", "1", "--json").out)["jobs"]
        assert "it is paused" in run("status", job["jobId"]).out
        assert run("queue").out.splitlines()[0] == "paused"
        assert json.loads(run("queue", "--json").out)["jobs"]["PENDING"] >= 1
    finally:
        run("resume")
    told = watched.communicate(timeout=60)[1].decode()
    assert (watched.returncode, "COMPLETED" in told) == (0, True), told


def test_a_dry_run_writes_nothing(run, file, live):
    [status] = json.loads(run("load", file, "--wait", "--json", "--validate", "--collection", "clidry").out)
    assert (status["validate"], status["progress"]["inserted"]) == (True, 5000)
    assert live.data["clidry"].count_documents({}) == 0


def test_top_and_profile_show_the_workers(run, live):
    until(lambda: live.http.get("/workers").json()["workers"], what="a word of the workers")
    assert len(json.loads(run("top", "--json").out)["workers"]) == 2
    assert "memory" in run("top", "--once", COLUMNS="160").out
    assert "decode" in run("profile", COLUMNS="200").out
    assert "has no share" in run("profile", "--seconds", "0", COLUMNS="200").out
    assert json.loads(run("profile", "--json").out)["workers"][0]["counts"]


def test_config_tells_where_each_value_came_from_and_no_secret(run, tmp_path):
    (tmp_path / ".env").write_text("ENGINE_WORKERS=3\n")
    rows = {row["name"]: row for row in json.loads(run("config", "--json", MONGO_URI="mongodb://u:geheim@h/x").out)}
    assert rows["ENGINE_WORKERS"] == {"name": "ENGINE_WORKERS", "value": "3", "from": ".env"}
    assert rows["MONGO_URI"] == {"name": "MONGO_URI", "value": "mongodb://***@h/x", "from": "environment"}
    assert rows["PORT"]["from"] == "default"
    assert "ENGINE_WORKERS" in run("config", COLUMNS="200").out


def test_the_doctor_finds_what_is_right_and_what_is_wrong(run, live):
    settings = live.settings
    right = {
        "MONGO_URI": settings.mongo_uri.get_secret_value(),
        "AWS_ENDPOINT_URL": settings.aws_endpoint_url,
        "AWS_BUCKET_NAME": settings.aws_bucket_name,
        "AWS_ACCESS_KEY_ID": settings.aws_access_key_id,
        "AWS_SECRET_ACCESS_KEY": settings.aws_secret_access_key.get_secret_value(),
        "ENGINE_CONTROL_DB": settings.engine_control_db,
    }
    found = {f["what"]: f["state"] for f in json.loads(run("doctor", "--json", **right).out)}
    assert (found["MongoDB"], found["S3"], found["processes"], found["API"]) == ("ok", "ok", "ok", "ok")
    nobody = json.loads(
        run("doctor", "--json", **right | {"API_URL": "http://127.0.0.1:1", "ENGINE_CONTROL_DB": "nobody"}).out
    )
    told = {f["what"]: (f["state"], f["said"]) for f in nobody}
    assert (told["API"][0], told["processes"][0]) == ("warning", "warning")
    assert "no worker is alive: start `headrace engine`" in told["processes"][1]
    wrong = run("doctor", code=1, **right | {"AWS_BUCKET_NAME": "nowhere", "ENGINE_WORKERS": "500"})
    assert "there is no bucket nowhere" in wrong.out
    [clock] = [line for line in wrong.out.splitlines() if " clock " in line]
    assert clock.startswith("warning")
    assert "do what the line of S3 says" in clock
    assert "ENGINE_WORKERS=500" in wrong.out
    assert found["clock"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "nothing"], "there is no job"),
        (["status", "6b04fa6b779ece9e9d7d9cbc"], "there is no job"),
        (["load", "no-such-file"], "cannot be read"),
        (["load", "."], "is a folder"),
        (["load", "s3://"], "reads bucket"),
    ],
)
def test_what_a_person_gets_wrong_is_a_sentence(run, arguments, said):
    assert said in run(*arguments, code=1).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["load", "/dev/null", "--format", "bogus"], "--format"),
        (["load", "/dev/null", "--max-errors", "5x"], "--max-errors"),
        (["load", "/dev/null", "--collection", "system.users"], "--collection"),
        (["load", "/dev/null", "--collection", "$x"], "--collection"),
        (["load", "/dev/null", "--priority", "5000"], "--priority"),
        (["load", "/dev/null", "--run-at", "tomorrow"], "--run-at"),
        (["load", "/dev/null", "--timeout-seconds", "0"], "--timeout-seconds"),
        (["load", "-", "-"], "named twice"),
        (["load", "a", "./a"], "named twice"),
        (["jobs", "--status", "bogus"], "--status"),
        (["jobs", "--url", "notaurl"], "--url"),
        (["token", "a b", "--scope", "read"], "NAME"),
    ],
)
def test_wrong_usage_names_the_option(run, tmp_path, arguments, said):
    (tmp_path / "a").write_text("{}\n")
    assert said in run(*arguments, code=2).err


@pytest.mark.parametrize("token", ["é", "hr_x\n", "a b"])
def test_a_token_or_an_address_that_cannot_be_one_is_named(run, token):
    assert "API_TOKEN" in run("jobs", code=1, API_TOKEN=token).err
    assert "API_URL" in run("jobs", code=1, API_URL="notaurl").err


def test_a_place_without_room_is_told(live):
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m api.cli jobs > /dev/full'],
        env=os.environ | {"API_URL": f"http://127.0.0.1:{live.port}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.startswith("headrace: there is no room")) == (1, True)
    assert len(done.stderr.splitlines()) == 1


def test_a_message_names_the_file_once(run):
    assert run("load", "s3://elsewhere/key", code=1).err.count("s3://elsewhere/key") == 1


@pytest.mark.parametrize("command", ["config", "api"])
def test_an_interruption_in_the_first_moments_is_quiet(tmp_path, command):
    code = f"import sys, api.cli; sys.argv = ['headrace', '{command}']; print(flush=True); api.cli.main()"
    for seconds in (0.02, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1].decode()
        assert (process.returncode, said) == (130, "")


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


def test_files_that_were_not_loaded_for_long_are_forgotten(run, file, tmp_path):
    run("load", file, "--collection", "cli")
    [note] = tmp_path.glob("headrace/loads/*")
    old = note.with_name("old")
    old.write_text("{}")
    os.utime(old, (time.time() - 31 * 86400,) * 2)
    run("load", file, "--collection", "cli")
    assert list(tmp_path.glob("headrace/loads/*")) == [note]


def test_pages_of_jobs_follow_each_other(run, live):
    keys = [live.objects.upload(io.BytesIO(b"{}\n"), f"cli/{uuid.uuid4().hex}").key for _ in range(3)]
    batch = live.http.post("/process", json={"fileKeys": keys, "collection": "paged"}).json()["batchId"]
    first = json.loads(run("jobs", "--batch", batch, "--limit", "2", "--json").out)
    rest = json.loads(run("jobs", "--batch", batch, "--cursor", first["next"], "--json").out)
    assert len({job["jobId"] for job in first["jobs"] + rest["jobs"]}) == 3
    assert f"--cursor {first['next']}" in run("jobs", "--batch", batch, "--limit", "2").err


def test_a_load_may_wait_for_its_time(run, file):
    job_id = run("load", file, "--run-at", "2099-01-01T00:00:00z", "--timeout-seconds", "9").out.strip()
    assert json.loads(run("cancel", job_id, "--json").out)["runAt"] == "2099-01-01T00:00:00.000Z"


def test_an_api_that_is_not_there_is_told(run):
    assert "does not answer" in run("jobs", code=1, API_URL="http://127.0.0.1:9").err


def test_an_unknown_option_is_usage(run):
    run("jobs", "--colour", code=2)


def test_a_token_that_is_drawn_is_accepted(run):
    told = json.loads(run("token", "ci", "--scope", "read", "--scope", "submit", "--json").out)
    assert told["entry"] == f"ci:read+submit:{hashlib.sha256(told['token'].encode()).hexdigest()}"


def test_a_load_that_was_interrupted_goes_on_where_it_was(run, live, tmp_path, start):
    path = tmp_path / "large.ndjson"
    line = b'{"text":"%s"}\n' % (b"x" * 1000)
    path.write_bytes(line * 60_000)
    process = start("load", path, "--collection", "resumed", "--wait")

    def noted():
        for note in tmp_path.glob("headrace/loads/*"):
            return json.loads(note.read_bytes() or b"{}").get("uploadId")
        return None

    upload = until(noted, what="the note of the upload")
    until(lambda: live.http.get(f"/uploads/{upload}").json().get("stored"), what="the first part")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, said
    assert "interrupted" in said
    before = {part["partNumber"] for part in live.http.get(f"/uploads/{upload}").json()["stored"]}
    assert before
    [status] = json.loads(run("load", path, "--collection", "resumed", "--wait", "--json").out)
    assert status["progress"]["inserted"] == 60_000
    assert live.http.get(f"/uploads/{upload}").status_code == 404  # the same upload, completed
    assert live.objects.head(status["fileKey"]).size == path.stat().st_size


def test_an_upload_whose_completion_was_not_heard_of_is_not_sent_again(run, file, live, tmp_path):
    [first] = json.loads(run("load", file, "--wait", "--json", "--collection", "unheard").out)
    [note] = tmp_path.glob("headrace/loads/*")
    known = json.loads(note.read_bytes())
    del known["key"]  # what is noted when the answer has come
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
    assert live.store.uploads.count_documents({}) == before


def test_what_comes_through_a_pipe_that_can_be_read_once_is_loaded(run, live, tmp_path):
    pipe = tmp_path / "pipe.ndjson"
    os.mkfifo(pipe)
    writer = subprocess.Popen(["sh", "-c", f"printf '{{\"n\":1}}\\n{{\"n\":2}}\\n' > '{pipe}'"])
    [status] = json.loads(run("load", pipe, "--wait", "--json", "--collection", "piped").out)
    assert writer.wait(10) == 0
    assert status["progress"]["inserted"] == 2
    assert live.data["piped"].count_documents({}) == 2


def test_a_load_that_was_interrupted_at_its_job_makes_no_second_one(run, live, tmp_path, start):
    path = tmp_path / "watched.ndjson"
    path.write_bytes(b'{"n":1}\n' * 3000)
    run("pause")
    try:
        process = start("load", path, "--collection", "watched", "--wait")
        until(lambda: live.store.jobs.find_one({"options.collection": "watched"}), what="the job")
        until(lambda: any(b'"key"' in n.read_bytes() for n in tmp_path.glob("headrace/loads/*")), what="the note")
        time.sleep(0.5)  # the answer that tells the job's id is here
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 130
    finally:
        run("resume")
    job_id = re.search(r"headrace status ([0-9a-f]{24}) --wait", said)[1]
    [status] = json.loads(run("load", path, "--collection", "watched", "--wait", "--json").out)
    assert status["jobId"] == job_id
    assert (status["status"], live.data["watched"].count_documents({})) == ("COMPLETED", 3000)
    # It is through, and was told so: the next one is a load of its own.
    [again] = json.loads(run("load", path, "--collection", "watched", "--wait", "--json").out)
    assert again["jobId"] != job_id


def test_standard_input_that_is_broken_off_leaves_no_upload(live, start):
    def unfinished():
        return live.s3.list_multipart_uploads(Bucket=live.bucket).get("Uploads", [])

    before = unfinished()
    process = start("load", "-", "--collection", "broken", stdin=subprocess.PIPE)
    process.stdin.write(b'{"n":1}\n' * 3_000_000)
    process.stdin.flush()
    until(lambda: len(unfinished()) > len(before), what="the upload")
    process.send_signal(signal.SIGINT)
    assert "nothing of it is kept" in process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert unfinished() == before
    assert live.store.jobs.count_documents({"options.collection": "broken"}) == 0


def test_an_interrupt_after_the_end_of_a_stream_tells_of_the_job_that_is_made(live, start, tmp_path):
    process = start("load", "-", "--collection", "unwatched", "--wait", stdin=subprocess.PIPE)
    process.stdin.write(b'{"n":1}\n' * 2_000_000)
    process.stdin.close()
    process.stdin = None
    until(lambda: live.store.jobs.count_documents({"options.collection": "unwatched"}), what="the job")
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1].decode()
    [job] = live.store.jobs.find({"options.collection": "unwatched"})
    assert process.returncode == 130
    assert f"headrace status {job['_id']} --wait" in told


def test_rejects_of_a_job_that_is_not_there_leave_the_file_as_it_was(run, tmp_path):
    out = tmp_path / "kept.ndjson"
    out.write_text("mine\n")
    run("rejects", "6b04fa6b779ece9e9d7d9cbc", "--out", out, code=1)
    assert out.read_text() == "mine\n"


def test_rejects_go_to_standard_output_where_a_dash_is_named(run, file):
    job_id = run("load", file, "--collection", "cli").out.strip()
    run("status", job_id, "--wait")
    assert run("rejects", job_id, "--out", "-").stdout == b"bad\n"


def test_config_masks_what_is_secret_in_an_address(run):
    uri = "mongodb://u:pw77@h1,h2/x?replicaSet=r&tlsCertificateKeyFilePassword=pw77&tls=true"
    told = run("config", "--json", AWS_ENDPOINT_URL="http://u:pw77@h:1", MONGO_URI=uri).out
    rows = {r["name"]: r["value"] for r in json.loads(told)}
    assert "pw77" not in told
    assert rows["MONGO_URI"] == "mongodb://***@h1,h2/x?replicaSet=r&tlsCertificateKeyFilePassword=***&tls=true"


def test_workers_show_in_the_process_list_what_they_do(live):
    assert all(title(pid).startswith("headrace: worker") for pid in live.engine.workers())
