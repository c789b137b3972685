"""What commands print: tables, jobs, the queue, and JSON."""

import io
import json
import sys

import pytest
from rich.console import Console

from api.commands.show import (
    bars,
    counted_since,
    job_lines,
    jobs_table,
    plainly,
    print_json,
    profile_table,
    queue_lines,
)
from api.commands.terminal import console, is_live
from engine.logs import printable


def worker(slot, lines, **seconds):
    counts = {"lines": lines} | {f"seconds_{stage}": spent for stage, spent in seconds.items()}
    return {"name": f"h:1:{slot}", "host": "h", "pid": 100 + slot, "slot": slot, "counts": counts}


def shown(workers):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(profile_table(workers))
    return capture.get()


def test_a_profile_shares_the_time_among_the_stages_in_which_any_is_spent():
    told = shown([worker(0, 1e6, decode=1.0, wait=3.0, stall=16.0, drain=4.0)])
    rows = {row.split()[0]: row.split()[1:] for row in told.splitlines() if row.split()}
    assert rows["0"] == ["1,000,000", "0.00", "0.00", "1.00", "0.00", "3.00", "16.00", "4.00", "0.00", "0.00"]
    assert [share for share in rows["share"] if share != "%"] == [
        "0",
        "0",
        "12",
        "0",
        "38",
        "50",
        "0",
        "0",
    ]  # `stall` has no share
    assert "`wait` / ENGINE_WRITERS" in " ".join(told.split())


def test_a_profile_fits_a_narrow_terminal():
    busy = [worker(slot, 123_456_789, read=9e9, decode=1e3, wait=12e4) for slot in range(2)]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(profile_table(busy))
    assert "…" not in capture.get()
    assert all(stage in capture.get() for stage in ("decode", "encode", "backoff", "246,913,578"))


def test_a_profile_is_of_the_time_between_two_looks():
    before = [worker(0, 1e6, decode=9.0)]
    now = [worker(0, 2e6, decode=10.0, wait=1.0), worker(1, 0)]
    told = shown(counted_since(before, now))
    assert told.count("1.00") == 4, told
    assert "10.00" not in told


def test_workers_of_containers_that_share_a_host_name_and_a_pid_are_not_taken_for_one():
    there = {"name": "h:2:0"}
    before = [worker(0, 100), worker(0, 1) | there]
    now = counted_since(before, [worker(0, 150), worker(0, 2) | there])
    assert [each["counts"]["lines"] for each in now] == [50, 1]


def test_a_profile_of_several_machines_tells_them_apart():
    there = worker(0, 1e6, decode=1.0) | {"host": "other"}
    told = shown([worker(0, 1e6, decode=1.0), there])
    assert [name in told for name in ("h 0", "other 0", "all")] == [True] * 3
    assert "h 0" not in shown([worker(0, 1e6, decode=1.0), worker(1, 1e6, decode=1.0)])


def test_what_a_file_is_called_is_shown_and_not_obeyed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    progress = {
        "lines": 1,
        "rejected": 0,
        "recordsPerSecond": 0.0,
        "percent": 1.0,
        "inserted": 1,
        "duplicates": 0,
        "blank": 0,
    }
    job = {
        "jobId": "6b04",
        "status": "FAILED",
        "progress": progress,
        "createdAt": "",
        "stopping": False,
        "alreadyLoadedBy": None,
    }
    job["error"] = {"code": "final", "message": "\x1b[31mred"}
    for key in ("logs[/x].ndjson", "a[bold]b:warning:", "bell\x07\x1b[2J", "two\nlines"):
        told = job | {"fileKey": key, "errors": []}
        console().print(jobs_table([told], 200))
        print("\n".join(job_lines(told)))
        said = capsys.readouterr().out
        assert said.count(printable(key)) == 2, said
        assert all(c.isprintable() or c == "\n" for c in said)


def test_jobs_can_be_read_on_a_terminal_of_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    progress = {"lines": 1234567, "rejected": 12, "percent": 43.2}
    job = {
        "jobId": "6b05ef7e2551f5d1095200f7",
        "status": "PROCESSING",
        "progress": progress,
        "fileKey": "01M-events.ndjson",
    }
    console().print(jobs_table([job | {"createdAt": "2026-11-24T20:22:33.123Z"}], 80))
    said = capsys.readouterr().out
    for cell in ("6b05ef7e2551f5d1095200f7", "PROCESSING", "43", "1,234,567", "12", "01M-"):
        assert cell in said, said
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said


def test_a_job_that_waits_for_its_time_tells_it():
    progress = dict.fromkeys(("percent", "lines", "inserted", "duplicates", "rejected", "blank", "recordsPerSecond"), 0)
    job = {"jobId": "6b04", "status": "PENDING", "stopping": False, "fileKey": "f", "progress": progress, "errors": []}
    job |= {"alreadyLoadedBy": None, "error": None, "runAt": "2099-01-01T00:00:00.000Z"}
    assert "  not before 2099-01-01T00:00:00.000Z" in list(job_lines(job))
    assert "not before" not in "".join(job_lines(job | {"status": "COMPLETED"}))
    waits = job | {"waitingFor": "a worker: none is alive"}
    assert "  waits for a worker: none is alive" in list(job_lines(waits))


def test_the_queue_tells_a_person_its_jobs_and_how_long_they_have_waited():
    queue = {"paused": True, "jobs": {"PENDING": 1234, "FAILED": 0}, "oldestSeconds": 75.3}
    assert list(queue_lines(queue)) == [
        "paused",
        "  1,234 PENDING, 0 FAILED",
        "  the oldest due job that has not started has waited 1:15",
    ]
    assert len(list(queue_lines(queue | {"oldestSeconds": 0}))) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "ascii", "latin-1"])
def test_json_is_json_whatever_letters_the_output_takes(monkeypatch, encoding):
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", output)
    print_json({"fileKey": "é\U0001f600☃"})
    output.flush()
    said = raw.getvalue()
    assert json.loads(said) == {"fileKey": "é\U0001f600☃"}
    assert said.isascii() == (encoding in ("ascii", "latin-1"))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_that_nobody_reads_ends_no_load(monkeypatch, terminal):
    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI systems do: what is written to a file stays lines
    gone = Console(file=Gone())
    assert is_live(gone) is terminal
    if not terminal:
        with bars(gone) as shown:
            shown.uploaded(shown.add("f"), 5, 5, 1.0)
    monkeypatch.setattr(sys, "stderr", Gone())
    plainly("something")


@pytest.mark.parametrize(("watched", "whole"), [(False, 100), (True, 50)])
def test_an_upload_is_half_of_the_work_only_if_its_job_is_watched(watched, whole):
    with bars(Console(file=io.StringIO()), watched=watched) as shown:
        task = shown.add("f")
        shown.uploaded(task, 5, 5, 1.0)
        assert shown._progress.tasks[task].completed == whole


def test_the_bars_of_files_that_are_done_make_room_for_the_others():
    with bars(Console(file=io.StringIO(), height=3, width=80)) as shown:
        tasks = [shown.add(name) for name in "abc"]
        shown.ended(tasks[0])
        assert [task.visible for task in shown._progress.tasks] == [False, True, True]
    with bars(Console(file=io.StringIO(), height=30, width=80)) as shown:
        shown.ended(shown.add("a"))
        assert shown._progress.tasks[0].visible
