"""What `headrace load` does: uploads files and submits their jobs, a few files at a time."""

import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import TaskID

from api.client import AWAY, PATIENCE_SECONDS, CallFailed, Client, is_stream, path_of, utf8_name
from api.commands.notes import Note, alone, forget_old, why_not_kept
from api.commands.show import Bars, bars, plainly
from api.commands.terminal import EXIT_INTERRUPTED
from api.commands.transfer import Transfer
from engine.errors import CommandError, HeadraceError
from engine.logs import get_logger, mask
from engine.model import TERMINAL, JobState

__all__ = ["STDIN", "Loaded", "Loader"]

FILES_AT_A_TIME: Final = 4
"""Files that are sent at a time, and jobs that are watched at a time."""

RATE_SAMPLES: Final = 16
SAMPLE_SECONDS: Final = 0.25
"""The rate of an upload is that since the oldest of its latest samples, this many and at least so far apart."""

STDIN: Final = "-"

TURNED_AWAY: Final = ("busy", "no_room")
"""Types of problems with which an upload is refused that may be accepted a little later; nothing of it is stored."""

TURN_SECONDS: Final = 1.0
"""Pause before such an upload is sent again."""

LOOK_SECONDS: Final = 0.1
"""How often the main thread checks for an interrupt; less than `transfer.LAST_CALL_SECONDS`, so that a stream that the
interrupt cut short is not taken for complete."""

ANSWER_SECONDS: Final = 5.0
"""How long an interrupt waits for the job of a stream that was read to its end."""


@dataclass(slots=True)
class Loaded:
    """What became of one file: its job's id once there is one, the job's last status, and what went wrong here."""

    file: str
    job_id: str | None = None
    key: str | None = None
    status: dict[str, Any] | None = None
    error: HeadraceError | None = None
    note: Note | None = None
    reused: bool = False
    """Whether an object that an earlier command uploaded is used for it."""
    earlier: bool = False
    """Whether an earlier command made its job, which has COMPLETED."""
    waited: bool = False
    """Whether another command was at work on it."""
    watching: "Future[None] | None" = None
    """The watch of its job, if that is watched."""
    by_hand: str = ""
    """How to create a stream's job by hand; set once its end is trusted. An interrupt then does not undo the upload."""

    def ended(self) -> bool:
        """Whether its job was watched to its end."""
        return self.status is not None and self.status["status"] in TERMINAL

    def went_well(self) -> bool:
        """Whether it has a job, which has COMPLETED if it was watched."""
        return self.error is None and (self.status is None or self.status["status"] == JobState.COMPLETED)

    def advice(self) -> str:
        """What is left of it after an interrupt, and what to do about that."""
        noted = self.note is not None and self.note.kept
        if self.job_id is not None:
            return f"its job goes on: watch it with `headrace status {self.job_id} --wait`"
        if self.by_hand and self.error is not None:
            return str(self.error)
        if self.key is not None and not noted:
            return (
                f"it is stored as {self.key}, but its job may or may not exist: look for it with "
                f"`headrace jobs --file {self.key}`"
            )
        if self.by_hand:
            return f"its job may or may not exist: look for it with `headrace jobs`; if there is none, {self.by_hand}"
        if noted and (self.key is not None or self.file.startswith("s3://")):
            return "its job may or may not exist: run the same command again, which creates no second one"
        if noted:
            return "its upload was interrupted: run the same command again to resume it"
        if self.file == STDIN:
            return "it was interrupted, and nothing of it is kept: send it again from the beginning"
        return "it was not started, or cannot be resumed: run the same command again"

    def summary(self) -> dict[str, Any]:
        """The result for a script: the job's last status, or what is known and the error."""
        if self.status is not None and self.error is None:
            return {"file": utf8_name(self.file), **self.status}
        known = {"file": utf8_name(self.file), "jobId": self.job_id, "fileKey": self.key}
        if self.error is None:
            return known
        return known | {"error": {"code": self.error.code, "message": utf8_name(mask(str(self.error)))}}


class _Meter:
    """Counts bytes that threads send, and how fast. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._samples = deque([(time.monotonic(), 0)], maxlen=RATE_SAMPLES)

    def add(self, number: int) -> tuple[int, float]:
        """Count `number` more bytes, below 0 if some have to be sent again; returns all bytes so far, and the bytes per
        second of late."""
        with self._lock:
            now, self._count = time.monotonic(), self._count + number
            since, before = self._samples[0]
            if now - self._samples[-1][0] >= SAMPLE_SECONDS:
                self._samples.append((now, self._count))
            return self._count, max(0, self._count - before) / max(now - since, 0.001)


class Loader:
    """Uploads files and submits their jobs, a few at a time, with a progress bar each."""

    def __init__(self, client: Client, options: dict[str, Any], *, wait: bool, through_api: bool) -> None:
        self._client = client
        self._options = options
        self._wait = wait
        self._through_api = through_api
        self._transfer = Transfer(client)
        self._watchers = ThreadPoolExecutor(FILES_AT_A_TIME, thread_name_prefix="watch")

    def run(self, files: list[str]) -> list[Loaded]:
        """Load the files; returns what became of each. One failure does not stop the others; an interrupt exits."""
        forget_old()
        if files != [STDIN] and (fault := why_not_kept()):
            plainly(f"{fault}: an interrupted upload will not be resumed, and a repeat will load a second copy")
        console = Console(highlight=False, emoji=False, stderr=True)
        pool = ThreadPoolExecutor(min(FILES_AT_A_TIME, len(files)), thread_name_prefix="file")
        loads = [Loaded(file) for file in files]
        try:
            with bars(console, watched=self._wait) as shown:
                for future in [pool.submit(self._one, load, shown) for load in loads]:
                    _await(future)
                for load in loads:
                    if load.watching is not None:
                        _await(load.watching)
        except KeyboardInterrupt:
            self._interrupted(loads)
        finally:
            for each in (pool, self._watchers):
                each.shutdown(wait=False, cancel_futures=True)
        if all(load.went_well() for load in loads):
            # Otherwise the same command is run again, and must not load again what has gone well.
            for load in loads:
                if load.note is not None:
                    load.note.done(self._options)
        return loads

    def _interrupted(self, loads: list[Loaded]) -> None:
        # A second interrupt ends the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
        # Listed before the stop, which makes the uploads under way fail.
        going = [load for load in loads if load.error is None]
        for load in loads:
            if load.error is not None:
                plainly(f"{load.file}: {load.error}")
        self._transfer.stop()
        until = time.monotonic() + ANSWER_SECONDS
        for load in going:
            while load.by_hand and load.job_id is None and load.error is None and time.monotonic() < until:
                time.sleep(0.02)
            if not load.ended():
                name = "standard input" if load.file == STDIN else load.file
                plainly(f"interrupted; {name}: {load.advice()}")
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)  # threads in the middle of a request would keep the process alive

    def _one(self, load: Loaded, shown: Bars) -> None:
        """Upload a file, submit its job, and have it watched."""
        task = shown.add("standard input" if load.file == STDIN else Path(load.file).name)
        with _told_of(load):
            with self._alone(load) as load.waited:
                load.key = self._stored(load, shown, task)
                load.job_id = self._submitted(load, load.key, shown, task)
            if self._wait:
                # In other threads: the next file is sent however long this job takes.
                load.watching = self._watchers.submit(self._watch, load, load.job_id, shown, task)
                return
        shown.ended(task)

    def _watch(self, load: Loaded, job_id: str, shown: Bars, task: TaskID) -> None:
        with _told_of(load):
            for status in self._client.states(job_id):
                load.status = status
                shown.processed(task, status)
        shown.ended(task)

    def _alone(self, load: Loaded) -> AbstractContextManager[bool]:
        """A context in which no other command uploads this file or submits its job; streams need none. Yields whether
        it had to wait for another command."""
        name = load.file
        if not name.startswith("s3://"):
            if name == STDIN or is_stream(Path(name)):
                return nullcontext(False)
            name = str(Path(name).resolve())
        what = "another `headrace load` is at work on it: waiting until its job is submitted"
        return alone(self._client.url, name, lambda: plainly(f"{load.file}: {what}"))

    def _submitted(self, load: Loaded, key: str, shown: Bars, task: TaskID) -> str:
        """Submit the job of an uploaded file; returns its id. Sends the file again if its object is gone."""
        try:
            return self._submit(load, key)
        except CallFailed as error:
            if load.note is None:
                # A stream cannot be sent again.
                look = f"if `headrace jobs --file {key}` shows no job, " if error.status in AWAY else ""
                advice = f"the file is stored: {look}{self._again(key)} with the same options submits it"
                raise CommandError(f"{error}; {advice}") from None
            if error.status != 404 or not load.reused:
                raise
        # The object is gone, which a token without the scope `read` could not notice before.
        load.note.forget()
        load.key = self._stored(load, shown, task)
        return self._submit(load, load.key)

    def _submit(self, load: Loaded, key: str) -> str:
        if load.note is None:
            return self._client.process(key, self._options, secrets.token_hex(16))[0]
        ticket, again = load.note.ticket(self._options, waited=load.waited)
        job_id, state = self._client.process(key, self._options, ticket)
        if again and state in (JobState.FAILED, JobState.CANCELLED):
            # The job is that of an earlier command, and has failed or was cancelled: submit another.
            ticket, _ = load.note.ticket(self._options, anew=True)
            job_id, _ = self._client.process(key, self._options, ticket)
        load.earlier = again and state == JobState.COMPLETED
        return job_id

    def _again(self, key: str) -> str:
        """How to submit an uploaded object: the command, or the call if the bucket's name cannot be read."""
        try:
            bucket = self._client.ask("GET", "/files", params={"limit": 1})["bucket"]
        except HeadraceError:
            return f"POST /process/{key}"
        return f"`headrace load s3://{bucket}/{key}`"

    def _stored(self, load: Loaded, shown: Bars, task: TaskID) -> str:
        """Make sure that the file is in S3; returns its key."""
        if load.file.startswith("s3://"):
            return self._object(load)
        path = None if load.file == STDIN else Path(load.file)
        size = None if path is None or is_stream(path) else path.stat().st_size
        meter = _Meter()

        def sent(number: int) -> None:
            count, rate = meter.add(number)
            shown.uploaded(task, count, size, rate)

        if path is None or size is None:
            return self._stream(load, path, sent)
        key, load.reused = self._file(load, path, size, sent)
        if load.reused:
            shown.unchanged(task)
        return key

    def _object(self, load: Loaded) -> str:
        """Check an object that is in the bucket already; returns its key."""
        bucket, _, key = load.file.removeprefix("s3://").partition("/")
        if utf8_name(key) != key:
            raise CommandError("its key is not valid UTF-8: write it in UTF-8")
        there = self._client.insist("GET", "/files", params={"prefix": key, "limit": 1})["bucket"]
        if bucket != there:
            raise CommandError(f"this API reads only bucket {there}: put the object there, or use another API")
        stamp = [self._client.insist("GET", f"/files/{path_of(key)}")["etag"]]
        load.note = Note(self._client.url, load.file, stamp)
        load.note.put()
        return key

    def _stream(self, load: Loaded, path: Path | None, sent: Callable[[int], None]) -> str:
        """Upload a stream, standard input if `path` is None; returns its key."""

        def at_end(by_hand: str) -> None:
            load.by_hand = by_hand

        if path is not None:
            with path.open("rb") as content:
                return self._transfer.stream(content, path.name, sent, at_end)
        if sys.stdin is None:
            raise CommandError("standard input is closed: name a file, or pipe one")
        return self._transfer.stream(sys.stdin.buffer, "stdin.ndjson", sent, at_end)

    def _file(self, load: Loaded, path: Path, size: int, sent: Callable[[int], None]) -> tuple[str, bool]:
        """Upload a file; returns its key, and whether an object that an earlier command uploaded is used for it."""
        found = path.stat()
        # `cp -p` and `touch -r` can give other content the same modification time, but not the same change time.
        stamp = [size, found.st_mtime_ns, found.st_ctime_ns]
        note = Note(self._client.url, str(path.resolve()), stamp)
        key = self._transfer.there(note, size)
        reused = key is not None
        if key is None and self._through_api:
            key = note.stored(self._uploaded(path, sent))
        elif key is None:
            load.note = note  # from its first part on it can be resumed
            key = self._transfer.file(path, note, sent)
        load.note = note
        return key, reused

    def _uploaded(self, path: Path, sent: Callable[[int], None]) -> dict[str, Any]:
        """Upload a file through the API; returns its answer. Waits for its turn for `PATIENCE_SECONDS`. Raises CommandError
        if the file is too large for that."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            counted: list[int] = []

            def count(number: int, counted: list[int] = counted) -> None:
                counted.append(number)
                sent(number)

            try:
                return self._client.stored(path, count)
            except CallFailed as error:
                if error.status == 413:
                    raise CommandError(
                        "it is larger than API_MAX_UPLOAD_BYTES allows through the API: leave out --through-api"
                    ) from None
                # These are refused before anything is stored. After any other failure, another try may store it twice.
                if error.problem not in TURNED_AWAY or time.monotonic() > end:
                    raise
            sent(-sum(counted))
            time.sleep(TURN_SECONDS)


def _await(future: "Future[None]") -> None:
    """Wait for the end of a thread's work; raises what it raised."""
    # In short waits: an interrupt that the kernel delivers to another thread does not end a long one.
    while not wait([future], timeout=LOOK_SECONDS).done:
        pass
    future.result()


@contextmanager
def _told_of(load: Loaded) -> Iterator[None]:
    """A context whose errors become the load's error, so that they do not affect the other files."""
    try:
        yield
    except HeadraceError as error:
        load.error = error
    except OSError as error:
        load.error = CommandError(f"it cannot be read: {error.strerror}")
    except Exception as error:  # noqa: BLE001 (reported, with the file's name)
        get_logger().debug("a load failed", action="command", exc_info=error)
        load.error = CommandError(f"something unexpected happened ({type(error).__name__}: {error})")
