"""`headrace up` as a user runs it, with the servers that it embeds.

It loads a file and shows the result; whatever goes wrong is reported in one sentence and leaves no process behind.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import bson
import pytest
from bson import ObjectId
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient
from rich.console import Console

from api.commands.up import _show_documents
from engine.local.servers import mongod_path
from engine.ports import free_port
from tests.running import ROOT, alive, until


class Up:
    """`headrace up` with data, ports and output of its own."""

    def __init__(self, folder, *arguments, limit=None, **changes):
        self.folder = folder / "run"  # not tmp_path, where the test itself runs
        self.folder.mkdir(exist_ok=True)
        self.data = data = folder / "data, ours"
        for name in ("mongod.port", "s3.port"):  # other suites start servers at the same time
            if not (data / name).exists() and "ENGINE_DATA_DIR" not in changes:
                data.mkdir(exist_ok=True)
                (data / name).write_text(f"{free_port()}\n")
        self.port = int(changes.get("PORT", free_port()))
        environment = {
            "PORT": str(self.port),
            "ENGINE_DATA_DIR": str(data),
            "PYTHONPATH": str(ROOT),
        } | changes
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "up", *arguments],
            env=os.environ | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=(lambda: resource.setrlimit(limit[0], (limit[1], limit[1]))) if limit else None,
        )
        self.said = ""

    def wait_for(self, *words):
        """Read the output until a line contains one of these words."""
        for line in self.process.stdout:
            self.said += line
            if any(word in line for word in words):
                return
        pytest.fail(f"{words} was never said:\n{self.said}")

    def finish(self, seconds=150):
        self.said += self.process.communicate(timeout=seconds)[0]
        return self.process.returncode

    def left(self):
        """Pids of the processes that run in the folders of this run."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and alive(int(folder.name)):
                with suppress(OSError):
                    if (folder / "cwd").readlink() in (self.folder, self.data):
                        found.append(int(folder.name))
        return found


@pytest.fixture
def up(tmp_path):
    started = []

    def start(*arguments, **changes):
        started.append(Up(tmp_path, *arguments, **changes))
        return started[-1]

    yield start
    for made in started:
        for pid in made.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        made.process.wait()
        made.process.stdout.close()


def sentence(run):
    """The error of a failed run, which must be a single line."""
    assert "Traceback" not in run.said
    lines = [line for line in run.said.splitlines() if line.startswith("headrace: ")]
    assert len(lines) == 1, run.said
    return lines[0]


def test_once_shows_the_whole_job_and_a_second_run_finds_what_the_first_one_stored(up):
    first = up("--once", "--records", "100000")
    assert first.finish() == 0
    assert "COMPLETED: 100,000 lines, 100,000 inserted, 0 duplicates, 0 rejected, 0 blank" in first.said
    assert re.search(r"[\d,]+ records/s", first.said)
    assert "holds 100,000 documents; two of them:" in first.said
    assert len(re.findall(r'^  \{"_id":"[0-9a-f]{24}"', first.said, re.MULTILINE)) == 2
    assert len(re.findall(r"^  curl ", first.said, re.MULTILINE)) >= 3
    assert first.left() == []
    second = up("--once", "--records", "100000")
    assert second.finish() == 0
    assert "holds 200,000 documents" in second.said
    assert second.left() == []


def test_it_serves_until_ctrl_c_and_then_stops_everything(up):
    run = up("--records", "1000")
    run.wait_for("Serving.")
    assert len(run.left()) >= 6  # itself, mongod, weed, API, supervisor, workers
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 0
    assert run.left() == []


def test_nothing_outlives_a_killed_one(up):
    run = up("--records", "1000")
    run.wait_for("Serving.")
    run.process.kill()
    until(lambda: not run.left(), what="the end of all its children")


def test_a_file_of_the_reader_is_loaded_and_its_bad_lines_told(up, tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"one\ntwo\n\xff\n")
    run = up("--once", "--file", str(tmp_path / "mine.txt"))
    assert run.finish() == 0
    assert "COMPLETED: 3 lines, 2 inserted, 0 duplicates, 1 rejected" in run.said
    assert "Rejected at byte 8: invalid_utf8" in run.said


def test_a_job_that_fails_ends_with_exit_code_3_and_says_why(up, tmp_path):
    (tmp_path / "mine.ndjson").write_bytes(b"\x1f\x8b\x08\x00")
    run = up("--once", "--file", str(tmp_path / "mine.ndjson"))
    assert run.finish() == 3
    assert "is compressed (gzip)" in run.said


@pytest.mark.parametrize(
    ("victim", "said"),
    [("weed", "weed was killed by SIGKILL"), ("headrace: supervisor", "`headrace engine` was killed by SIGKILL")],
)
def test_a_part_that_dies_under_the_job_ends_it_in_a_sentence(up, victim, said):
    run = up("--records", "100000")
    run.wait_for("Uploading")
    [pid] = [pid for pid in run.left() if Path(command_line(pid).split("\0")[0]).name == victim]
    os.kill(pid, signal.SIGKILL)
    assert run.finish() == 1
    assert said in sentence(run)
    assert "a job that had not ended goes on when Headrace runs here again" in sentence(run)
    assert run.left() == []


def test_a_database_that_dies_is_told_at_once_and_not_waited_for(up):
    run = up("--records", "1000", ENGINE_GRACE_SECONDS="300")
    run.wait_for("Serving.")
    [pid] = [pid for pid in run.left() if Path(command_line(pid).split("\0")[0]).name == "mongod"]
    os.kill(pid, signal.SIGKILL)
    assert run.finish() == 1
    assert "mongod was killed by SIGKILL" in sentence(run)
    assert run.left() == []


def test_a_job_that_ctrl_c_cuts_short_goes_on_the_next_time_with_nothing_loaded_beside(up, tmp_path):
    # A stopping engine leases no more ranges, so the job is still open when the command ends, even on a fast machine.
    first = up("--records", "400000")
    first.wait_for("PENDING", "PROCESSING")
    first.process.send_signal(signal.SIGINT)
    assert first.finish() == 0
    assert "has not ended: it goes on when Headrace runs here again" in first.said
    assert first.left() == []
    second = up("--records", "0")
    second.wait_for("Serving.")
    client = MongoClient(re.search(r"MongoDB +(\S+)", second.said).group(1))
    with client:
        until(lambda: client["headrace"]["records"].count_documents({}) == 400_000, 180, "the rest of the job")
    second.process.send_signal(signal.SIGINT)
    assert second.finish() == 0
    assert "Uploading" not in second.said


def command_line(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def test_a_second_ctrl_c_hurries_the_stop_and_harms_nothing(up):
    run = up("--records", "1000")
    run.wait_for("Serving.")
    for _ in range(3):
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert run.finish() == 0
    assert "Traceback" not in run.said
    assert run.left() == []
    again = up("--once", "--records", "1000")
    assert again.finish() == 0
    assert "holds 2,000 documents" in again.said
    assert "recovering from an unclean" not in (again.data / "mongod.log").read_text().lower()


def test_ctrl_c_during_its_own_stop_does_not_change_what_became_of_the_job(up):
    run = up("--once", "--records", "1000")
    run.wait_for("/status/")  # the last line of its output; then it stops
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 0
    assert "Traceback" not in run.said
    assert run.left() == []


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"])
def test_settings_of_a_server_that_is_not_named_are_told(up, name):
    run = up("--once", "--records", "1000", **{name: "http://127.0.0.1:1"})
    assert run.finish() == 1
    assert f"{name} is set and AWS_BUCKET_NAME is not" in sentence(run)
    assert run.left() == []


def test_ctrl_c_before_it_serves_ends_it_quietly(up):
    run = up("--once", "--records", "1000000")  # it must not end before the interrupt
    run.wait_for("Starting")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    assert "Traceback" not in run.said
    assert run.left() == []


def test_ctrl_c_while_servers_are_started_is_never_lost(up):
    # Python only prints an exception that a signal handler raises during a fork.
    for turn in range(6):
        run = up("--records", "1000000")
        run.wait_for("Starting")
        time.sleep(turn / 1000)
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 0
        assert "Traceback" not in run.said
        assert "Serving" not in run.said
    assert run.left() == []


def test_a_sample_that_has_no_room_is_told_and_leaves_nothing(up):
    run = up("--once", "--records", "2000000", limit=(resource.RLIMIT_FSIZE, 200 * 2**20))
    assert run.finish() == 1
    assert "a sample of 2,000,000 records cannot be written to" in sentence(run)
    assert "ENGINE_DATA_DIR" in sentence(run)
    assert list(run.data.glob("sample*")) == []


def test_a_name_with_quotes_brackets_and_spaces_is_a_name_like_any_other(up, tmp_path):
    path = tmp_path / 'it\'s [bold] "mine" $HOME.ndjson'
    path.write_bytes(b'{"n":1}\n')
    run = up("--once", "--file", str(path))
    assert run.finish() == 0
    assert f"Uploading {path}" in run.said
    assert "COMPLETED: 1 lines, 1 inserted" in run.said


def test_no_secret_is_shown_when_what_it_belongs_to_is_not_there(up):
    run = up(
        "--once",
        MONGO_URI="mongodb://me:hunter%40two@127.0.0.1:1/x?serverSelectionTimeoutMS=500",
        AWS_BUCKET_NAME="b",
        AWS_ENDPOINT_URL="http://127.0.0.1:1",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="s3cr3t-key",
    )
    assert run.finish() == 1
    assert "MongoDB" in sentence(run)
    for secret in ("hunter", "s3cr3t-key"):
        assert secret not in run.said
        for log in run.data.rglob("*.log"):
            assert secret not in log.read_text()


def test_a_port_that_is_taken_is_named(up):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = up("--once", PORT=str(taken.getsockname()[1]))
        assert run.finish() == 1
        assert f"port {run.port} is taken" in sentence(run)
    assert run.left() == []


@pytest.mark.parametrize(("name", "word"), [("missing.ndjson", "No such file"), (".", "is a folder")])
def test_a_file_that_cannot_be_read_is_named(up, name, word):
    run = up("--once", "--file", name)
    assert run.finish() == 1
    assert word in sentence(run)


def test_a_second_run_in_the_same_folder_is_refused(up):
    first = up("--records", "1000")
    first.wait_for("Serving.")
    second = up("--once", "--records", "1000")
    assert second.finish() == 1
    assert "another Headrace already runs" in sentence(second)
    assert first.process.poll() is None


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            'echo "mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file" >&2; exit 127',
            ["libcurl.so.4", "apt-get install libcurl4"],
        ),
        ("echo some trouble; exit 14", ["mongod ended with exit code 14", "some trouble"]),
        ("echo No space left on device; exit 1", ["no space left on the disk"]),
    ],
)
def test_a_mongod_that_does_not_come_up_is_told_in_a_sentence(up, tmp_path, script, words):
    fake = tmp_path / "bin" / "mongod"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    run = up("--once", PATH=f"{fake.parent}:{os.environ['PATH']}")
    assert run.finish() == 1
    for word in words:
        assert word in sentence(run)
    assert run.left() == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mongod", "Failed to set up listener: Address already in use"),
        ("weed", "port 8833 for S3 (specified by flag s3.port) is not available on 127.0.0.1 and cannot be used"),
        ("weed", "Failed to remove /tmp/seaweedfs-s3-8833.sock: operation not permitted"),
    ],
)
def test_a_server_whose_port_is_taken_in_the_last_moment_is_started_on_another(up, tmp_path, name, words):
    fake = tmp_path / "bin" / name
    fake.parent.mkdir()
    real = mongod_path() if name == "mongod" else Path(sys.executable).parent / "weed"
    fake.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/second ] && exec {real} "$@"\ntouch {tmp_path}/second; echo "{words}"; exit 48\n'
    )
    fake.chmod(0o755)
    run = up("--once", "--records", "1000", PATH=f"{fake.parent}:{os.environ['PATH']}")
    assert run.finish() == 0, run.said
    assert (tmp_path / "second").exists()


def test_wrong_settings_are_all_told(up):
    run = up("--once", ENGINE_WORKERS="none", ENGINE_RANGE_BYTES="1")
    assert run.finish() == 1
    assert "ENGINE_WORKERS=none" in run.said
    assert "ENGINE_RANGE_BYTES=1" in run.said
    assert "Traceback" not in run.said


def test_a_data_folder_that_cannot_be_written_is_named(up, tmp_path):
    (tmp_path / "file").write_text("")
    run = up("--once", ENGINE_DATA_DIR=str(tmp_path / "file" / "below"))
    assert run.finish() == 1
    assert "ENGINE_DATA_DIR" in sentence(run)


@pytest.mark.parametrize("command", ["api", "engine"])
def test_api_and_engine_alone_name_what_is_not_set(tmp_path, command):
    run = subprocess.run(
        [sys.executable, "-m", "api.cli", command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 1
    assert "MONGO_URI" in run.stderr
    assert "AWS_BUCKET_NAME" in run.stderr
    assert "Traceback" not in run.stderr


def test_what_others_have_stored_in_the_collection_is_shown_whatever_it_is(settings, store, capsys):
    bad_text = bson.encode({"text": "zz"}).replace(b"zz", b"\xff\xfe")
    store.data["records"].insert_many([{"at": DatetimeMS(2**60)}, RawBSONDocument(bad_text)])
    status = {"jobId": str(ObjectId()), "collection": "records"}
    _show_documents(settings, {}, status, Console())
    told = capsys.readouterr().out
    assert "holds 2 documents" in told
    assert "\ufffd" in told
