"""Real servers, a real engine in its own processes, and what a load took: wall time, CPU, the workers' memory."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from api.client import Client
from engine.children import before_exec, stop_signals
from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.store import Store, job_key
from engine.local.servers import LocalServers
from engine.machine import cores
from engine.model import Job, JobOptions, Source
from engine.ports import free_port
from engine.s3.client import connect
from engine.s3.objects import Objects
from engine.settings import Settings

__all__ = [
    "ROOT",
    "Engine",
    "Rig",
    "Taken",
    "cpu_of",
    "current_commit",
    "forget_peak",
    "isolate",
    "on_leave",
    "peak_mb",
]

TICKS = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.1
"""Interval of polls for the end of a load: polls take CPU from it, and wall times come from the job's timestamps."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a load took, and the job as it ended.

    `wall` is seconds from submission to COMPLETED by the database's clock. CPU seconds are measured over `seconds`,
    from just before the submission until a poll finds the job ended, so shares of the cores relate to `seconds` and not
    to `wall`: `cpu` is that of the workers, `servers` that of each server, and `others` that of everything else on the
    machine, None if it cannot be told. `peak_mb` is the highest resident memory of a worker.
    """

    wall: float
    seconds: float
    cpu: float
    peak_mb: int
    servers: dict[str, float]
    others: float | None
    job: Job

    @property
    def lines(self) -> int:
        return self.job.progress.tally.lines


def isolate() -> None:
    """Ignore Headrace's settings in the environment and `.env`, so that its defaults are measured, on servers of its
    own, and no real bucket is touched."""
    for name in [name for name in os.environ if name.lower() in Settings.model_fields]:
        del os.environ[name]
    Settings.model_config["env_file"] = None


def on_leave(leave: Callable[[int], object]) -> Callable[[], None]:
    """Call `leave`, which must raise, with the number of the signal on Ctrl-C, on TERM, and on HUP unless that is
    ignored, as under nohup.

    By default TERM and HUP end a process at once and leave gigabytes of the servers' files behind. Once one of the
    signals has come, further ones are ignored.

    Returns a function that calls `leave` again if a signal has come. Call it between sections: an exception that is
    raised during a garbage collection is lost.
    """
    came: list[int] = []

    def once(number: int, frame: object) -> None:
        for other in asked:
            signal.signal(other, signal.SIG_IGN)
        came.append(number)
        leave(number)

    def again() -> None:
        if came:
            leave(came[0])

    asked = stop_signals()
    for number in asked:
        signal.signal(number, once)
    return again


def current_commit() -> str:
    """The commit of this source tree, with `-dirty` appended if files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _environment(settings: Settings, changes: dict[str, Any]) -> dict[str, str]:
    given = {
        name.upper(): str(getattr(value, "get_secret_value", lambda value=value: value)())
        for name, value in settings.model_dump(exclude_defaults=True).items()
    }
    return given | {name.upper(): str(value) for name, value in changes.items()} | {"PYTHONPATH": str(ROOT)}


def cpu_of(pid: int) -> float:
    """CPU seconds that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _cpu_of_all() -> float:
    """CPU seconds used so far on the cores that this process may run on, including time stolen by the hypervisor."""
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [[int(field) for field in fields[1:9]] for fields in lines if fields[0] in mine]
    return sum(sum(core) - core[3] - core[4] for core in ticks) / TICKS


def peak_mb(pid: int) -> int:
    """Peak resident memory of a process, in MB of 1e6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 // 10**6


def forget_peak(pid: int) -> None:
    """Reset the peak memory of a process to what it has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Engine:
    """`headrace engine` as a process; `changes` are settings by name. Leaving its context stops and checks it."""

    def __init__(self, settings: Settings, folder: Path, changes: dict[str, Any]) -> None:
        log = folder / f"engine-{uuid.uuid4().hex[:8]}.log"
        environment = _environment(settings, changes)
        self._log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "engine"],
                env=os.environ | environment,
                cwd=folder,  # it has no .env
                stdout=output,
                stderr=output,
                preexec_fn=before_exec,  # noqa: PLW1509 (no threads run yet)
            )

    def workers(self) -> list[int]:
        """Pids of the workers."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def ready(self, count: int) -> None:
        """Wait until `count` workers have booted."""
        end = time.monotonic() + 60
        while self._log.read_text().count("worker is ready") < count:
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"the engine did not start: {self._log.read_text()[-500:]}")
            time.sleep(0.02)

    def cpu(self) -> float:
        """CPU seconds that the workers have used so far."""
        return sum(map(cpu_of, self.workers()))

    def peak_mb(self) -> int:
        """The highest peak memory of any worker, in MB of 1e6 bytes."""
        return max(map(peak_mb, self.workers()))

    def alive(self) -> None:
        """Raises RuntimeError if the engine has ended, since the caller would wait for ever."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the engine ended with {self.process.returncode}: {self._log.read_text()[-500:]}")

    def stop(self) -> None:
        """Send TERM and wait until it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def check(self) -> None:
        """Raises RuntimeError if the log has a warning, such as for a replaced worker: the figures would show it."""
        events = [orjson.loads(line) for line in self._log.read_bytes().splitlines() if line.startswith(b"{")]
        if trouble := [line["event"] for line in events if line["level"] not in ("info", "debug")]:
            raise RuntimeError(f"the engine had trouble, so that its figures tell of that: {'; '.join(trouble)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if error is None:
            self.check()


class Rig:
    """Servers under `folder`, and clients of them. Use it as a context manager: it removes the folder at the end."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        isolate()
        self.folder = folder
        self._stack = ExitStack()
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with ExitStack() as undone:
            undone.enter_context(self._stack)  # an interrupt from here on leaves nothing behind either
            self._servers = self._stack.enter_context(LocalServers(Settings(), folder))
            fresh = {"mongo_uri": self._servers.overrides["mongo_uri"].replace("/headrace?", "/bench?")}
            self.settings = Settings.model_validate(
                # As many workers as most engines here have: defaults of other settings depend on it.
                self._servers.overrides | fresh | {"engine_control_db": "bench_control", "engine_workers": 2} | changes
            )
            self.store = Store(self.settings)
            self._stack.callback(self.store.close)
            self.store.prepare()
            self.ledger = Ledger(self.store, self.settings.engine_lease_seconds)
            self.queue = Queue(self.store, self.ledger)
            self.s3 = connect(self.settings)
            self.bucket = self.settings.aws_bucket_name or ""
            self.objects = Objects(self.s3, self.bucket)
            self._lines: dict[str, int] = {}
            undone.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def engine(self, workers: int = 2, **changes: Any) -> Engine:
        """An engine whose workers have booted; it is stopped with the rig at the latest."""
        engine = Engine(self.settings, self.folder, {"engine_workers": workers, "engine_log_format": "json"} | changes)
        self._stack.callback(engine.stop)
        engine.ready(workers)
        return engine

    @contextmanager
    def api(self) -> Iterator[tuple[Client, int]]:
        """The HTTP API on a free port: a client of it, and its pid."""
        port = free_port()
        environment = _environment(self.settings, {"port": port, "api_max_upload_bytes": "10GiB"})
        with (self.folder / "api.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "api"],
                env=os.environ | environment,
                cwd=self.folder,
                stdout=output,
                stderr=output,
                preexec_fn=before_exec,  # noqa: PLW1509 (no threads run yet)
            )
        client = Client(f"http://127.0.0.1:{port}")
        try:
            end = time.monotonic() + 30
            while client.not_ready():
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError(f"the API did not start: {(self.folder / 'api.log').read_text()[-500:]}")
                time.sleep(0.05)
            yield client, process.pid
        finally:
            client.close()
            process.terminate()
            process.wait(30)

    def upload(self, path: Path) -> Source:
        """Store a file in S3."""
        with path.open("rb") as content:
            lines = sum(piece.count(b"\n") for piece in iter(lambda: content.read(1024 * 1024), b""))
            content.seek(0)
            source = self.objects.upload(content, f"{uuid.uuid4().hex}-{path.name}")
        self._lines[source.key] = lines
        return source

    def _submit(self, source: Source, through: Client | None) -> Job:
        """Submit a job for an object, into a collection of its own; through the HTTP API if a client is given."""
        collection = f"c{uuid.uuid4().hex[:8]}"
        if through is not None:
            return self.queue.get(through.process(source.key, {"collection": collection, "force": True})[0])
        return self.queue.submit(source, JobOptions(collection=collection, force=True))

    def _wait(self, job: Job, *engines: Engine) -> Job:
        """Wait until these engines have COMPLETED the job. Raises RuntimeError if it, or an engine, ends otherwise.

        It polls only whether the job is open: reading its numbers this often would take CPU from the load.
        """
        while self.store.jobs.find_one({"_id": job_key(job.id), "open": True}, {"_id": True}) is not None:
            for engine in engines:
                engine.alive()
            time.sleep(POLL_SECONDS)
        found = self.queue.get(job.id)
        if found.state != "COMPLETED":
            raise RuntimeError(f"the job ended as {found.state}: {found.failure}")
        return found

    def check(self, job: Job) -> None:
        """Raises RuntimeError unless each line of the object became a document; drops the collection if so."""
        name = job.options.collection
        documents, lines = self.store.data[name].count_documents({}), self._lines[job.source.key]
        if not documents == job.progress.tally.lines == lines:
            raise RuntimeError(f"{documents} documents, {job.progress.tally.lines} lines told, {lines} in the file")
        self.store.data.drop_collection(name)

    def load(self, source: Source, *engines: Engine, through: Client | None = None) -> Taken:
        """Load an object into a collection of its own, which `check` drops."""
        began = time.perf_counter()
        before, servers, all = sum(engine.cpu() for engine in engines), self.servers_cpu(), _cpu_of_all()
        job = self._wait(self._submit(source, through), *engines)
        seconds = time.perf_counter() - began
        cpu = sum(engine.cpu() for engine in engines) - before
        taken_by = {server: seconds - servers[server] for server, seconds in self.servers_cpu().items()}
        # Under a CPU quota below these cores, what others use of them cannot be told.
        whole = cores() == len(os.sched_getaffinity(0))
        others = max(0.0, _cpu_of_all() - all - cpu - sum(taken_by.values())) if whole else None
        peak = max((engine.peak_mb() for engine in engines), default=0)
        assert job.finished_at is not None
        wall = (job.finished_at - job.created_at).total_seconds()
        return Taken(wall, seconds, cpu, peak, taken_by, others, job)

    def servers_cpu(self) -> dict[str, float]:
        """CPU seconds that the database and the S3 server have used so far, by name."""
        return {name: cpu_of(pid) for name, pid in self._servers.pids.items()}

    def primary(self) -> tuple[str, int]:
        """Host and port of the database."""
        self.store.ping()
        found = self.store.client.primary
        assert found is not None
        return found[0], found[1]

    def cache_bytes(self) -> int:
        """Maximum size of the database's cache."""
        return int(self.store.client.admin.command("serverStatus")["wiredTiger"]["cache"]["maximum bytes configured"])
