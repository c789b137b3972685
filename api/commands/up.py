"""`headrace up`: starts real servers, and the engine and the API as children, and loads one file to show the result."""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import orjson
from bson import ObjectId
from rich.console import Console

from api.auth import draw, tokens_of
from api.client import CallFailed, Client, check_file, is_stream, local_url
from api.commands.show import watch
from api.commands.terminal import EXIT_INTERRUPTED, EXIT_OF
from api.operations import Scope
from engine.children import before_exec, exit_code, signal_name, signals_blocked, stop_signals
from engine.control.store import Store, leniently, translated
from engine.errors import HeadraceError, StartError
from engine.local import sample
from engine.local.servers import LocalServers
from engine.logs import printable
from engine.ports import check_port
from engine.settings import Settings

__all__ = ["up"]

READY_SECONDS: Final = 60.0
"""How long the API and the servers may take until they are ready."""

QUIET_SECONDS: Final = 5.0
"""How long to wait before reporting what is not ready yet."""

SAMPLE_SEED: Final = 1

GOES_ON: Final = "goes on when Headrace runs here again (`make run RECORDS=0` loads nothing more)"

OF_THEM: Final = ("", "; one of them:", "; two of them:")
"""By the number of documents that are shown."""


class _Stopped(BaseException):
    """TERM, INT or HUP arrived. Not an Exception: nothing may swallow it."""


class _Signals:
    """Handles signals: one starts the stop; later ones only hurry it, so that the servers still stop gracefully."""

    def __init__(self) -> None:
        self.count = 0
        self._before: int | None = None  # how many had arrived when the stop began

    def note(self, number: int, frame: object) -> None:
        """Handle a signal."""
        self.count += 1
        # Raised for every signal: where Python cannot propagate it, as from a library's callback, it is lost.
        if self._before is None:
            raise _Stopped

    def stopping(self) -> None:
        """The stop begins: from now on a signal raises nothing, and does not change the exit code."""
        if self._before is None:
            self._before = self.count

    def hurried(self) -> bool:
        """Whether a signal has arrived since the stop began."""
        return self._before is not None and self.count > self._before


class _Child:
    """One `headrace` command as a child process with its log in a file."""

    def __init__(self, name: str, log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            output.write(b"")
            self._from = output.tell()
            self.process = subprocess.Popen(
                # -P: a folder `api` in the working directory is not ours.
                [sys.executable, "-P", "-m", "api.cli", name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops them in order
                preexec_fn=before_exec,  # noqa: PLW1509 (the threads that exist hold no lock)
                env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )

    def check(self) -> None:
        """Raises StartError if it has ended by itself."""
        if (code := exit_code(self.process)) is not None:
            lines = self.log.read_bytes()[self._from :].decode(errors="replace").strip().splitlines()
            last = lines[-1][:500] if lines else "nothing"
            how = f"was killed by {signal_name(-code)}" if code < 0 else "ended early"
            raise StartError(f"`headrace {self.name}` {how}; its last log line: {last} (log: {self.log})")

    def stop(self, seconds: float, signals: _Signals) -> None:
        """Send TERM; after `seconds`, or when another signal hurries the stop, QUIT; three seconds later KILL."""
        end = time.monotonic() + seconds
        self.process.terminate()
        while self.process.poll() is None and time.monotonic() < end and not signals.hurried():
            time.sleep(0.02)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class _Parts:
    """Everything that runs: the embedded servers, and the API and the engine as children."""

    servers: LocalServers
    children: list[_Child] = field(default_factory=list)

    def check(self) -> None:
        """Raises StartError if one of them has ended by itself."""
        if died := self.servers.died():
            raise StartError(died)
        for child in self.children:
            child.check()

    def check_at_work(self) -> None:
        """Like `check`, but the error also says what becomes of a job that has not ended."""
        try:
            self.check()
        except StartError as error:
            raise StartError(f"{error}. Everything else was stopped; a job that had not ended {GOES_ON}") from None

    def serve(self, console: Console) -> NoReturn:
        """Serve until a signal arrives (raises _Stopped) or one of them ends (raises StartError)."""
        console.print("Serving. Ctrl-C stops it.")
        while True:
            time.sleep(0.5)
            self.check_at_work()


def up(settings: Settings, file: Path | None, once: bool, records: int) -> int:
    """Run everything and load a file; returns the exit code.

    Args:
        settings: servers that they do not name are started here.
        file: the file to load through the HTTP API; None for a sample.
        once: end after the job, with 0 if it COMPLETED; else serve until told to stop.
        records: lines of the sample; 0 loads nothing.

    Raises:
        StartError: something cannot be started, or has ended by itself; nothing is left running.
        CommandError: the file cannot be read, or changes while it is sent.
        CallFailed: a call of the API failed.
    """
    console = _console()
    if file is not None:
        check_file(file)
        if is_stream(file):
            raise StartError(
                f"{file} can be read only once, from its beginning: name a file, or pipe it to `headrace load -`"
            )
    if settings.aws_endpoint_url is not None and settings.aws_bucket_name is None:
        raise StartError("AWS_ENDPOINT_URL is set and AWS_BUCKET_NAME is not: name the bucket, or unset both")
    if settings.aws_session_token is not None and settings.aws_bucket_name is None:
        raise StartError(
            "AWS_SESSION_TOKEN is set and AWS_BUCKET_NAME is not: name the bucket, or unset the token, which the S3 "
            "server that is started here does not know"
        )
    check_port(settings.port, settings.api_host)
    signals = _Signals()
    for number in stop_signals():
        signal.signal(number, signals.note)
    try:
        with ExitStack() as stack:
            try:
                code = _run(settings, file, once, records, console, stack, signals)
            finally:
                signals.stopping()
        console.print("Stopped.")
        return code
    except _Stopped:
        console.print("Stopped.")
        return EXIT_INTERRUPTED if once else 0


def _run(
    settings: Settings,
    file: Path | None,
    once: bool,
    records: int,
    console: Console,
    stack: ExitStack,
    signals: _Signals,
) -> int:
    folder = settings.engine_data_dir
    servers = LocalServers(settings)
    console.print("Starting the servers …")
    stack.callback(servers.stop)
    servers.start()
    environment = {name.upper(): str(value) for name, value in servers.overrides.items()}
    token = None
    if tokens_of(settings):
        # The API needs a token: this command draws its own, valid as long as it runs.
        token, entry = draw("up", [Scope.READ, Scope.SUBMIT])
        known = settings.api_tokens.get_secret_value() if settings.api_tokens else ""
        environment["API_TOKENS"] = f"{known} {entry}"
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    parts = _Parts(servers)
    for name in ("api", "engine"):  # stopped in the opposite order
        with signals_blocked():  # no signal gets between starting a child and registering its stop
            child = _Child(name, logs / f"{name}.log", environment)
            stack.callback(_stop, child, servers, settings.engine_grace_seconds + 5, signals)
        parts.children.append(child)
    url = local_url(settings)
    client = Client(url, token)
    _wait_ready(console, client, parts)
    overrides = servers.overrides
    console.print(f"MongoDB  {overrides.get('mongo_uri', 'as set in MONGO_URI')}")
    console.print(f"S3       {overrides.get('aws_endpoint_url', 'as set in the AWS_ settings')}")
    console.print(f"API      {url}, engine with {settings.engine_workers} workers; logs in {logs}")

    if file is None and records == 0:
        return 0 if once else parts.serve(console)
    if file is None:
        file = folder / f"sample-{records}.ndjson"
        if not file.exists():
            console.print(f"Writing a sample of {records:,} records …")
            _write_sample(file, records)
    size = file.stat().st_size
    console.print(f"Uploading {file} ({size / 1e6:,.1f} MB) …")
    try:
        key = client.upload(file)
        job_id, _ = client.process(key, {})
        try:
            console.print(f"Processing {key} as job {job_id} …")
            status = watch(client, job_id, console, file.name, wait=1, check=parts.check_at_work)
        except _Stopped:
            console.print(f"Job {job_id} has not ended: it {GOES_ON}")
            raise
    except CallFailed:
        parts.check_at_work()  # says more, if one of them has ended
        raise
    if once:
        signals.stopping()  # the job has ended, and with that the exit code is known
    _summary(settings, overrides, status, console)
    console.print("By hand:")
    bearer = '-H "Authorization: Bearer $API_TOKEN" ' if token else ""
    for line in (
        f"curl {bearer}-F file=@FILE {url}/upload",
        f"curl {bearer}-X POST {shlex.quote(f'{url}/process/{key}')}",
        f"curl {bearer}{url}/status/{status['jobId']}",
    ):
        console.print(f"  {line}")
    console.print()
    if once:
        return EXIT_OF[status["status"]]
    return parts.serve(console)


def _stop(child: _Child, servers: LocalServers, seconds: float, signals: _Signals) -> None:
    """Stop a child, with no grace period if it would wait for a server that has ended."""
    child.stop(0 if servers.died() else seconds, signals)


def _write_sample(file: Path, records: int) -> None:
    part = file.with_suffix(".part")
    try:
        sample.write(part, records, SAMPLE_SEED)
        part.rename(file)
    except OSError as error:
        raise StartError(
            f"a sample of {records:,} records cannot be written to {file.parent} ({error.strerror}): make room there, set "
            "ENGINE_DATA_DIR to another folder, or ask for fewer (RECORDS=10000)"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _wait_ready(console: Console, client: Client, parts: _Parts) -> None:
    deadline = time.monotonic() + READY_SECONDS
    shown, show_from = "", time.monotonic() + QUIET_SECONDS
    while (why := client.not_ready()) is not None:
        parts.check()
        if why != shown and time.monotonic() > show_from:
            console.print(f"Not ready yet: {why}")
            shown = why
        if time.monotonic() > deadline:
            raise StartError(f"not ready within {READY_SECONDS:g} seconds: {why} (log: {parts.children[0].log})")
        time.sleep(0.1)


def _console() -> Console:
    """A console that prints text as it is."""
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def _summary(settings: Settings, overrides: dict[str, Any], status: dict[str, Any], console: Console) -> None:
    progress = status["progress"]
    console.print()
    console.print(
        f"{status['status']}: {progress['lines']:,} lines, {progress['inserted']:,} inserted, "
        f"{progress['duplicates']:,} duplicates, {progress['rejected']:,} rejected, "
        f"{progress['blank']:,} blank; {progress['recordsPerSecond']:,.0f} records/s"
    )
    if status["error"]:
        console.print(f"Error: {printable(status['error']['message'])}")
    for reject in status["errors"]:
        console.print(f"Rejected at byte {reject['offset']}: {reject['reason']}: {printable(reject['detail'])}")
    try:
        _show_documents(settings, overrides, status, console)
    except HeadraceError as error:  # the job's outcome does not depend on it
        console.print(f"Its documents cannot be shown: {error}")
    console.print()


def _show_documents(settings: Settings, overrides: dict[str, Any], status: dict[str, Any], console: Console) -> None:
    settings = Settings.model_validate(settings.model_dump() | overrides)
    with translated("reading what was loaded"), closing(Store(settings)) as store:
        collection = leniently(store.data)[status["collection"]]
        count = collection.estimated_document_count()
        job = store.jobs.find_one({"_id": ObjectId(status["jobId"])}) or {}
        tag = bytes(job.get("plan", {}).get("tag", b""))
        ids = {"$gte": ObjectId(tag + bytes(6)), "$lte": ObjectId(tag + b"\xff" * 6)} if len(tag) == 6 else {}
        # Records that bring their own ids cannot be found by the job's tag: then any two are shown.
        found = list(collection.find({"_id": ids}).limit(2)) if ids else []
        found = found or list(collection.find().limit(2))
    console.print(
        f"\nCollection {settings.data_db()}.{status['collection']} holds {count:,} documents{OF_THEM[len(found)]}"
    )
    for document in found:
        text = orjson.dumps(document, default=str).decode()
        console.print("  " + printable(text if len(text) < 1000 else text[:1000] + " …"))
