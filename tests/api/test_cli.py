"""The command line against an API on real servers: each command, its JSON and its exit code."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from api.client import CallFailed
from api.commands.main import app
from engine.text.encode import COMPILED
from tests.api.conftest import reported, watching
from tests.running import ROOT, title, until


def test_a_load_without_waiting_prints_the_id_that_the_other_commands_take(run, file, live):
    job_id = run("load", file, "--collection", "cli").out.strip()
    assert json.loads(run("status", job_id, "--wait", "--json").out)["status"] == "COMPLETED"
    assert "COMPLETED" in run("status", job_id).out
    assert job_id in run("jobs", "--limit", "100", COLUMNS="200").out
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


def test_a_watch_tells_what_a_job_waits_for(run, file, start, live):
    run("pause")
    try:
        time.sleep(0.7)
        watched = start("load", file, "--wait")
        assert b"it is paused" in watching(watched)
        [job] = json.loads(run("jobs", "--status", "pending", "--limit", "1", "--json").out)["jobs"]
        assert "it is paused" in run("status", job["jobId"]).out
        assert run("queue").out.splitlines()[0] == "paused"
        # A count that took long is reused for as much longer.
        until(lambda: live.http.get("/queue").json()["jobs"]["PENDING"], 200, "a new count of the jobs")
        assert json.loads(run("queue", "--json").out)["jobs"]["PENDING"] >= 1
    finally:
        run("resume")
    told = watched.communicate(timeout=60)[1].decode()
    assert (watched.returncode, "COMPLETED" in told) == (0, True), told


def test_top_and_profile_show_the_workers(run, file, live):
    run("load", file, "--wait")

    reported(live)
    assert len(json.loads(run("top", "--json").out)["workers"]) == 2
    assert "memory" in run("top", "--once", COLUMNS="160").out
    assert "decode" in run("profile", COLUMNS="200").out
    # The caption wraps at the width of the table, which depends on its figures.
    assert "has no share" in " ".join(run("profile", "--seconds", "0", COLUMNS="200").out.split())
    assert "workers report every 2 seconds" in run("profile", "--seconds", "1", code=2, COLUMNS="200").err
    told = json.loads(run("profile", "--json", "--seconds", "0").out)["workers"]
    assert any(worker["counts"].get("lines") for worker in told)
    idle = json.loads(run("profile", "--json", "--seconds", "2").out)["workers"]
    assert [worker["counts"].get("lines", 0) for worker in idle] == [0, 0]


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
    told = {f["what"]: (f["state"], f["message"]) for f in nobody}
    assert (told["API"][0], told["processes"][0]) == ("warning", "warning")
    assert "no worker is alive: start `headrace engine`" in told["processes"][1]
    wrong = run("doctor", code=1, **right | {"AWS_BUCKET_NAME": "nowhere", "ENGINE_WORKERS": "500"})
    assert "there is no bucket nowhere" in wrong.out
    [clock] = [line for line in wrong.out.splitlines() if " clock " in line]
    assert clock.startswith("warning")
    assert "do what the S3 line says" in clock
    assert "ENGINE_WORKERS=500" in wrong.out
    assert found["clock"] == "ok"
    assert found["encoder"] == ("ok" if COMPILED else "warning")


def test_the_doctor_finds_a_queue_of_a_later_version_and_shows_no_password(run, live):
    settings = live.settings
    later = settings.mongo_uri.get_secret_value(), f"{settings.engine_control_db}_later"
    live.store.client[later[1]]["schema"].insert_one({"_id": "version", "version": 99})
    try:
        done = run(
            "doctor",
            "--json",
            code=1,
            MONGO_URI=later[0],
            ENGINE_CONTROL_DB=later[1],
            API_URL="http://u:pw77@127.0.0.1:1",
        )
    finally:
        live.store.client.drop_database(later[1])
    told = {f["what"]: (f["state"], f["message"]) for f in json.loads(done.out)}
    assert told["MongoDB"][0] == "wrong"
    assert "schema version 99" in told["MongoDB"][1]
    assert "127.0.0.1:1" in told["API"][1]
    assert "pw77" not in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "a\udcff"], "not valid UTF-8"),
        (["jobs", "--file", "caf\udce9.ndjson"], "not valid UTF-8"),
        (["load", "s3://b/caf\udce9"], "not valid UTF-8"),
        (["status", "nothing"], "there is no job"),
        (["status", "6b04fa6b779ece9e9d7d9cbc"], "there is no job"),
        (["load", "no-such-file"], "cannot be read"),
        (["load", "."], "is a folder"),
        (["load", "s3://"], "reads only bucket"),
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


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_a_host_that_cannot_be_one_is_told(run, host):
    there = {"API_URL": "", "API_HOST": host}
    assert f"http://{host}:3000 is not a valid address" in run("jobs", code=1, **there).err
    for tokens in ("", f"me:read:{'0' * 64}"):
        found = json.loads(run("doctor", "--json", code=1, API_TOKENS=tokens, **there).out)
        [api] = [f for f in found if f["what"] == "API"]
        assert api["state"] == "wrong"
        assert f"API_HOST={host} is not an address of this machine" in api["message"]


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
        said = process.communicate(timeout=60)[1].decode()
        assert (process.returncode, said) == (130, "")


def test_pages_of_jobs_follow_each_other(run, live):
    keys = [live.objects.upload(io.BytesIO(b"{}\n"), f"cli/{uuid.uuid4().hex}").key for _ in range(3)]
    batch = live.http.post("/process", json={"fileKeys": keys, "collection": "paged"}).json()["batchId"]
    first = json.loads(run("jobs", "--batch", batch, "--limit", "2", "--json").out)
    rest = json.loads(run("jobs", "--batch", batch, "--cursor", first["next"], "--json").out)
    assert len({job["jobId"] for job in first["jobs"] + rest["jobs"]}) == 3
    assert f"--cursor {first['next']}" in run("jobs", "--batch", batch, "--limit", "2").err


def test_an_api_that_is_not_there_is_told(run):
    assert "does not answer" in run("jobs", code=1, API_URL="http://127.0.0.1:9").err


def test_a_load_without_an_api_is_told_at_once_and_not_waited_for(file, monkeypatch):
    monkeypatch.setattr("api.commands.remote.Loader", lambda *_, **__: pytest.fail("it began"))
    ended = CliRunner().invoke(app, ["load", str(file), "--url", "http://127.0.0.1:9"])
    assert isinstance(ended.exception, CallFailed)
    assert "does not answer" in str(ended.exception)


def test_a_closed_standard_output_ends_no_command(live, tmp_path):
    command = f"exec {sys.executable} -P -m api.cli jobs >&-"
    environment = os.environ | {"API_URL": str(live.http.base_url), "PYTHONPATH": str(ROOT)}
    made = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert (made.returncode, "unexpected" in made.stderr) == (0, False), made.stderr


def test_an_unknown_option_is_usage(run):
    run("jobs", "--colour", code=2)


def test_a_token_that_is_drawn_is_accepted(run):
    told = json.loads(run("token", "ci", "--scope", "read", "--scope", "submit", "--json").out)
    assert told["entry"] == f"ci:read+submit:{hashlib.sha256(told['token'].encode()).hexdigest()}"


def test_rejects_of_a_job_that_is_not_there_leave_the_file_as_it_was(run, tmp_path):
    out = tmp_path / "kept.ndjson"
    out.write_text("mine\n")
    run("rejects", "6b04fa6b779ece9e9d7d9cbc", "--out", out, code=1)
    assert out.read_text() == "mine\n"


def test_rejects_go_to_standard_output_where_a_dash_is_named(run, file):
    job_id = run("load", file, "--collection", "cli").out.strip()
    run("status", job_id, "--wait")
    assert run("rejects", job_id, "--out", "-").stdout == b"bad\n"


def test_pages_of_rejects_follow_each_other(run, tmp_path):
    path = tmp_path / "bad.ndjson"
    path.write_bytes(b"bad\n" * 3)
    job_id = run("load", path, "--collection", "cli").out.strip()
    run("status", job_id, "--wait")
    first = run("rejects", job_id, "--limit", "2")
    assert "add --cursor 4, or save all raw lines with --out FILE" in first.err
    rest = run("rejects", job_id, "--cursor", "4")
    assert (first.out.count("invalid_json"), rest.out.count("invalid_json"), rest.err) == (2, 1, "")


def test_config_masks_what_is_secret_in_an_address(run):
    uri = "mongodb://u:pw77@h1,h2/x?replicaSet=r&tlsCertificateKeyFilePassword=pw77&tls=true"
    told = run("config", "--json", AWS_ENDPOINT_URL="http://u:pw77@h:1", MONGO_URI=uri).out
    rows = {r["name"]: r["value"] for r in json.loads(told)}
    assert "pw77" not in told
    assert rows["MONGO_URI"] == "mongodb://***@h1,h2/x?replicaSet=r&tlsCertificateKeyFilePassword=***&tls=true"


def test_workers_show_in_the_process_list_what_they_do(live):
    assert all(title(pid).startswith("headrace: worker") for pid in live.engine.workers())
