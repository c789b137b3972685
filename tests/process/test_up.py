"""`headrace up` as a person runs it: it shows the main job, and whatever goes wrong is one sentence with nothing left."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from engine.local import free_port
from tests.running import ROOT, alive, until


class Up:
    """`headrace up` with data, ports and output of its own."""

    def __init__(self, folder, *arguments, **changes):
        self.folder = folder / "run"  # not that of the tests themselves
        self.folder.mkdir(exist_ok=True)
        self.port = int(changes.get("PORT", free_port()))
        environment = {
            "PORT": str(self.port),
            "ENGINE_DATA_DIR": str(folder / "data"),
            "PYTHONPATH": str(ROOT),
        } | changes
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "up", *arguments],
            env=os.environ | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""

    def wait_for(self, word):
        for line in self.process.stdout:
            self.said += line
            if word in line:
                return
        pytest.fail(f"{word!r} was never said:\n{self.said}")

    def finish(self, seconds=60):
        self.said += self.process.communicate(timeout=seconds)[0]
        return self.process.returncode

    def left(self):
        """Processes that were started in the folder of this run."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and alive(int(folder.name)):
                with suppress(OSError):
                    if (folder / "cwd").readlink() == self.folder:
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
    """What a run that failed said: its last line, which must be the only complaint."""
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
    until(lambda: not run.left(), 10, "the end of all its children")


def test_a_file_of_the_reader_is_loaded_and_its_bad_lines_told(up, tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"one\ntwo\n\xff\n")
    run = up("--once", "--file", str(tmp_path / "mine.txt"))
    assert run.finish() == 0
    assert "COMPLETED: 3 lines, 2 inserted, 0 duplicates, 1 rejected" in run.said
    assert "Rejected at byte 8: invalid_utf8" in run.said


def test_a_job_that_fails_ends_with_exit_code_1_and_says_why(up, tmp_path):
    (tmp_path / "mine.ndjson").write_bytes(b"\x1f\x8b\x08\x00")
    run = up("--once", "--file", str(tmp_path / "mine.ndjson"))
    assert run.finish() == 1
    assert "is compressed (gzip)" in run.said


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
        ("echo some trouble; exit 14", ["mongod ended at once with exit code 14", "some trouble"]),
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


def test_make_says_what_to_install_where_python_has_no_venv_module(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    made = subprocess.run(["make", "install", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0
    assert "has no venv module: sudo apt-get install python3-venv" in made.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_help_lists_every_target_with_a_line():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [target for target in targets if not re.search(rf"make {target} +\w", listed)] == []


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
