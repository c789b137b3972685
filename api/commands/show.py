"""What commands print: bars, tables and sentences for people, JSON for scripts."""

import codecs
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from api.client import Client
from api.commands.terminal import is_live
from engine.control.stats import STAGES
from engine.logs import mask, printable, printable_lines
from engine.model import TERMINAL

__all__ = [
    "Bars",
    "bars",
    "counted_since",
    "job_lines",
    "jobs_table",
    "plainly",
    "print_json",
    "profile_table",
    "queue_lines",
    "watch",
    "workers_table",
]

LINE_SECONDS: Final = 1.0
"""How often a bar prints a line where there is no terminal."""

WIDE_COLUMNS: Final = 110
"""A terminal of this many columns has room for all columns of the table of jobs."""


def plainly(text: str) -> None:
    """Print a message for a person on standard error, without secrets or control characters."""
    with suppress(OSError):  # nobody reads it any more, which must not end the work
        print(printable_lines(f"headrace: {mask(text)}"), file=sys.stderr)


def print_json(value: object) -> None:
    """Print a line of JSON on standard output, in ASCII if that does not take UTF-8."""
    text = orjson.dumps(value, default=str)
    if codecs.lookup(sys.stdout.encoding).name == "utf-8":
        print(text.decode())
    else:
        print(json.dumps(orjson.loads(text)))


class Bars:
    """One progress bar for each file, through its upload and its job; lines where there is no terminal."""

    def __init__(self, progress: Progress, console: Console, *, watched: bool) -> None:
        self._progress = progress
        self._console = console
        self._watched = watched
        self._printed_at: dict[TaskID, float] = {}
        self._uploading: set[TaskID] = set()

    def add(self, name: str) -> TaskID:
        """Add a bar for a file."""
        return self._progress.add_task(printable(name), total=100, state="", text="")

    def uploaded(self, task: TaskID, sent: int, size: int | None, rate: float) -> None:
        """Show that `sent` of `size` bytes, None if not known, were uploaded, at `rate` bytes per second."""
        share = 100 * sent / size if size else None
        text = f"{sent / 1e6:,.0f} MB  {rate / 1e6:,.0f} MB/s"
        left = (size - sent) / rate if size and rate else None
        self._uploading.add(task)
        self._show(task, "uploading", share, text, left, last=size is not None and sent >= size)

    def unchanged(self, task: TaskID) -> None:
        """Show that the file was uploaded before and has not changed."""
        self._uploading.add(task)
        self._show(task, "uploaded", 100, "before, and unchanged since", None, last=True)

    def processed(self, task: TaskID, status: dict[str, Any]) -> None:
        """Show the progress of the job."""
        progress, state = status["progress"], status["status"]
        rate = progress["recordsPerSecond"]
        speed = rate * progress["bytesDone"] / progress["lines"] / 1e6 if progress["lines"] else 0.0
        text = f"{progress['lines']:,} lines  {rate:,.0f} records/s  {speed:,.0f} MB/s"
        if waits := status.get("waitingFor"):
            text = f"waits for {printable(waits)}"
        elif state == "PENDING" and status["runAt"]:
            text = f"not before {status['runAt']}"
        if progress["rejected"]:
            text += f"  {progress['rejected']:,} rejected"
        left = None if waits else progress["secondsLeft"]
        self._show(task, state, progress["percent"], text, left, last=state in TERMINAL)

    def _show(
        self, task: TaskID, state: str, share: float | None, text: str, left: float | None, *, last: bool
    ) -> None:
        # One bar from start to end: if the file is uploaded first, the upload is one half and its job, if it is watched,
        # the other.
        whole = share or 0
        if task in self._uploading and self._watched:
            whole = whole / 2 if state in ("uploading", "uploaded") else 50 + whole / 2
        if left is not None and not last:
            text += f"  {_span(left)} left"
        self._progress.update(task, state=state, completed=whole, text=text)
        now = time.monotonic()
        if not is_live(self._console) and (last or now - self._printed_at.get(task, 0) >= LINE_SECONDS):
            self._printed_at[task] = now
            name = self._progress.tasks[task].description
            percent = f"{share:>5.1f} %" if share is not None else "      "
            with suppress(OSError):  # nobody reads it any more, or its disk is full
                print(f"{name}  {state:<10} {percent}  {text}", file=self._console.file, flush=True)

    def ended(self, task: TaskID) -> None:
        """Nothing more will happen to a file: its bar makes room for others, if there are more than rows."""
        if len(self._progress.tasks) >= self._console.height:
            self._progress.update(task, visible=False)


def _span(seconds: float) -> str:
    """A duration as people write it: 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def bars(console: Console, *, watched: bool = True) -> Iterator[Bars]:
    """A context that shows bars on a console. `watched`: they also show the jobs of the files."""
    columns = (
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[state]:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %  {task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not is_live(console)) as progress:
        yield Bars(progress, console, watched=watched)


def watch(client: Client, job_id: str, console: Console, name: str = "job", **how: Any) -> dict[str, Any]:
    """Show a job's progress until it ends; returns its last status. `how` goes to `Client.states`."""
    with bars(console) as shown:
        task = shown.add(name)
        for status in client.states(job_id, **how):
            shown.processed(task, status)
    return status


def job_lines(status: dict[str, Any]) -> Iterator[str]:
    """A job as lines for a person to read."""
    return map(printable, _job_lines(status))


def _job_lines(status: dict[str, Any]) -> Iterator[str]:
    progress = status["progress"]
    yield f"{status['jobId']}  {status['status']}{' (stopping)' if status['stopping'] else ''}  {status['fileKey']}"
    yield (
        f"  {progress['percent']} %, {progress['lines']:,} lines: {progress['inserted']:,} inserted, "
        f"{progress['duplicates']:,} duplicates, {progress['rejected']:,} rejected, "
        f"{progress['blank']:,} blank; {progress['recordsPerSecond']:,.0f} records/s"
    )
    if waits := status.get("waitingFor"):
        yield f"  waits for {waits}"
    elif status["status"] == "PENDING" and status["runAt"]:
        yield f"  not before {status['runAt']}"
    if status["alreadyLoadedBy"]:
        yield f"  this version was loaded before by job {status['alreadyLoadedBy']}"
    if status["error"]:
        yield f"  {status['error']['code']}: {status['error']['message']}"
    for reject in status["errors"]:
        where = f"line {reject['line']}" if reject["line"] else f"byte {reject['offset']}"
        yield f"  rejected at {where}: {reject['reason']}: {reject['detail']}"
    for event in status.get("timeline", ()):
        yield f"  {event['at']}  {event['what']}"


def jobs_table(jobs: Sequence[dict[str, Any]], width: int) -> Table:
    """A table of jobs, one per row, for a terminal of `width` columns; a narrow one shows no times."""
    table = Table(
        Column("job", no_wrap=True, min_width=24),
        Column("status", no_wrap=True),
        Column("%", justify="right", no_wrap=True),
        Column("lines", justify="right", no_wrap=True),
        Column("rejected", justify="right", no_wrap=True),
        *([Column("created, UTC", no_wrap=True)] if width >= WIDE_COLUMNS else []),
        Column("file", overflow="fold"),
        box=None,
        pad_edge=False,
    )
    for job in jobs:
        progress = job["progress"]
        numbers = (f"{progress['percent']:.0f}", f"{progress['lines']:,}", f"{progress['rejected']:,}")
        created = [job["createdAt"][:16].replace("T", " ")] if width >= WIDE_COLUMNS else []
        table.add_row(job["jobId"], job["status"], *numbers, *created, printable(job["fileKey"]))
    return table


def queue_lines(queue: dict[str, Any]) -> Iterator[str]:
    """The queue as lines for a person to read."""
    yield "paused" if queue["paused"] else "running"
    yield "  " + ", ".join(f"{count:,} {state}" for state, count in queue["jobs"].items())
    if queue["oldestSeconds"]:
        yield f"  the oldest due job that has not started has waited {_span(queue['oldestSeconds'])}"


def workers_table(workers: Sequence[dict[str, Any]]) -> Table:
    """A table of workers, one per row."""
    job = Column("job", no_wrap=True, min_width=24)
    table = Table("host", "worker", "pid", job, "range", "%", "records/s", "memory MB", "peak MB")
    for worker in workers:
        doing = worker["doing"]
        what = [str(doing.get(name, "")) for name in ("job", "range", "percent")]
        memory = (f"{worker['memory'] / 1e6:,.0f}", f"{worker['memoryPeak'] / 1e6:,.0f}")
        table.add_row(worker["host"], str(worker["slot"]), str(worker["pid"]), *what, f"{worker['rate']:,.0f}", *memory)
    return table


def counted_since(before: Sequence[dict[str, Any]], workers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The workers with their counts since `before`; of a worker that is not in `before`, with all its counts."""
    earlier = {worker["name"]: worker["counts"] for worker in before}
    now: list[dict[str, Any]] = []
    for worker in workers:
        then = earlier.get(worker["name"], {})
        now.append(worker | {"counts": {name: value - then.get(name, 0) for name, value in worker["counts"].items()}})
    return now


def profile_table(workers: Sequence[dict[str, Any]]) -> Table:
    """A table of where the workers' time went: microseconds per line for each stage, or seconds if no line is done yet;
    then each stage's share over all workers. `stall` has no share: it is idle time."""
    table = Table(
        "worker",
        Column("lines", justify="right", no_wrap=True),
        *(Column(stage, justify="right", no_wrap=True) for stage in STAGES),
        title="microseconds per line",
        caption="Up to ENGINE_WRITERS batches of a worker `wait` at a time (twice as many if MongoDB is far away) "
        "while it goes on with others: "
        "compare `wait` / ENGINE_WRITERS with the other stages. `stall` is the reader's wait for room among them, and "
        "has no share; `drain` is its wait at the end of a range until all of it is written.",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    several = len({worker["host"] for worker in workers}) > 1
    for worker in [*workers, _sum(workers)] if len(workers) > 1 else workers:
        lines, seconds = worker["counts"].get("lines", 0), _seconds(worker)
        name = f"{worker['host']} {worker['slot']}" if several and "host" in worker else str(worker["slot"])
        table.add_row(name, f"{lines:,.0f}", *(_spent(s, lines) for s in seconds.values()))
    seconds = _seconds(_sum(workers))
    if whole := sum(seconds.values()) - seconds["stall"]:
        shares = ("" if stage == "stall" else f"{100 * s / whole:.0f} %" for stage, s in seconds.items())
        table.add_row("share", "", *shares)
    return table


def _seconds(worker: dict[str, Any]) -> dict[str, float]:
    return {stage: worker["counts"].get(f"seconds_{stage}", 0.0) for stage in STAGES}


def _spent(seconds: float, lines: float) -> str:
    """Microseconds per line; seconds if no line is done yet."""
    if not lines:
        return f"{seconds:.1f} s" if seconds else "–"
    spent = 1e6 * seconds / lines
    return f"{spent:.2f}" if spent < 100 else f"{spent:,.0f}"


def _sum(workers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = {name for worker in workers for name in worker["counts"]}
    counts = {name: sum(worker["counts"].get(name, 0) for worker in workers) for name in names}
    return {"slot": "all", "counts": counts}
