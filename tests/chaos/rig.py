"""One load under fire: put a file into S3, submit its job, run engines, do harm, wait, let the checker judge."""

import io
import os
import signal
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bson import ObjectId

from engine.control.jobs import Ticket
from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.store import Store
from engine.errors import Transient
from engine.model import TERMINAL, JobOptions
from engine.s3.client import connect
from engine.s3.objects import Objects
from engine.settings import Settings
from tests.chaos import corpus
from tests.chaos.checker import check
from tests.running import Running, title

HEAVY = {
    "engine_lease_seconds": 3,
    "engine_watchdog_seconds": 7,
    "engine_poll_seconds": 0.2,
    "engine_grace_seconds": 20,
}


@dataclass
class Report:
    """What one scenario did and found. It has passed when every kind of harm was done and nothing is wrong."""

    name: str
    faults: dict = field(default_factory=dict)
    figures: dict = field(default_factory=dict)
    records: int = 0
    problems: list = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self):
        return not self.problems and bool(self.faults) and all(self.faults.values())

    def line(self):
        faults = ", ".join(f"{count} {name}" for name, count in (self.faults | self.figures).items()) or "none"
        state = "passed" if self.passed else "FAILED"
        return f"{state}  {self.name:<12} {self.records:>9,} records  {self.seconds:>6.1f} s  faults: {faults}"


class Rig:
    """Engines, files and jobs on given servers, in databases of its own."""

    def __init__(self, settings, folder):
        self.settings = Settings.model_validate(settings.model_dump() | HEAVY)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.settings)
        self.store.prepare()
        self.queue = Queue(self.store, Ledger(self.store, self.settings.engine_lease_seconds))
        self.s3 = connect(self.settings)
        self.objects = Objects(self.s3, self.settings.aws_bucket_name)
        self._stack = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()
        for name in (self.settings.data_db(), self.settings.engine_control_db):
            with suppress(Exception):
                self.store.client.drop_database(name)
        self.store.close()

    def engine(self, module="tests.chaos.engine", ready=True, **changes):
        """A supervisor with its workers; returns it once they have booted."""
        given = HEAVY | {"engine_workers": 2, "engine_range_bytes": "1MiB"} | changes
        made = Running("engine", self.settings, self.folder / f"{uuid.uuid4().hex}.log", module, **given)
        self._stack.callback(made.end)
        if ready:
            made.ready(int(given["engine_workers"]))
        return made

    def submit(self, path, **options):
        """Put a file into S3 and its job on the queue; each job has a collection of its own."""
        with path.open("rb") as content:
            source = self.objects.upload(content, f"{uuid.uuid4().hex}-{path.name}")
        asked = JobOptions(**{"collection": f"c{uuid.uuid4().hex[:8]}", "max_errors": 10**9} | options)
        ticket = Ticket(uuid.uuid4().hex, "")  # so that it may be sent again
        return self._patiently(lambda: self.queue.submit(source, asked, ticket))

    def submit_small(self, path, count):
        """A file of its own for each of so many jobs, which workers take on together."""
        return [self.submit(path) for _ in range(count)]

    def overwrite(self, job, data=b'{"other":1}\n'):
        self.objects.upload(io.BytesIO(data), job.source.key)

    def ended(self, job):
        """Whether a job has ended."""
        return self._patiently(lambda: self.queue.get(job.id)).state in TERMINAL

    def _patiently(self, ask):
        """What is answered; a database that is away for a moment is asked again."""
        end = time.monotonic() + 60
        while True:
            try:
                return ask()
            except Transient:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def under_way(self, *jobs, seconds=240, pause=0.1):
        """Again and again, with a pause after each time, until these jobs have ended."""
        end = time.monotonic() + seconds
        while not all(map(self.ended, jobs)):
            if time.monotonic() > end:
                raise AssertionError(f"not ended within {seconds} s: {[self.queue.get(job.id) for job in jobs]}")
            yield
            time.sleep(pause)

    def wait(self, *jobs, seconds=240):
        """Until these jobs have ended; returns them."""
        for _ in self.under_way(*jobs, seconds=seconds):
            pass
        return [self.queue.get(job.id) for job in jobs]

    def busy(self, jobs):
        """Whether any of these is under way: harm counts only then."""
        return not all(map(self.ended, jobs))

    def keep_busy(self, path, jobs):
        """One more job for this file where all of these have ended: there is always a load to break."""
        if not self.busy(jobs):
            jobs.append(self.submit(path))

    def turns(self, faults, kind, wanted):
        """As many turns as it takes to inject a fault this often, and five times as many at most: a load may end before it."""
        for _ in range(5 * wanted):
            if faults[kind] >= wanted:
                return
            yield

    def settle(self, report, path, jobs):
        """Wait for these jobs for one file, and let the checker judge each."""
        self.wait(*jobs)
        for job in jobs:
            self.verify(report, path, job)

    def verify(self, report, path, job, state="COMPLETED", **more):
        """Let the checker judge a job that has ended; what is wrong goes into the report. `more` goes to the checker."""
        job = self.queue.get(job.id)
        if job.state != state:
            report.problems.append(f"job is {job.state}, not {state}: {job.failure}")
            return
        if held := self.store.ranges.count_documents({"state": "LEASED"}):
            report.problems.append(f"{held} leases are still held")
        key, lines, before = ObjectId(job.id), 0, {}
        for found in self.store.ranges.find({"job": key}).sort("_id", 1):
            before[found["_id"]["index"]] = lines
            lines += found["tally"]["lines"]
        with path.open("rb") as stream:
            verdict = check(
                stream,
                self.store.data[job.options.collection],
                self.store.rejects.find({"_id.job": key}),
                job.progress.tally.document(),
                job.plan.tag,
                before,
                job.plan.max_line_bytes,
                **more,
            )
        report.records += job.progress.tally.lines
        if not verdict.passed:
            report.problems.append(str(verdict))

    def holders(self, *engines):
        """Pids of workers that hold a lease now."""
        slots = {tuple(d["holder"].split(":")[1:3]) for d in self.store.ranges.find({"state": "LEASED"}, {"holder": 1})}
        wanted = {int(slot) for _, slot in slots}
        return [
            pid
            for engine in engines
            for pid in engine.workers()
            if any(f"worker {slot} job" in title(pid) for slot in wanted)
        ]


def kill(pid, number=signal.SIGKILL):
    """Whether the signal found its process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def made(rig, count, seed=1):
    """A file of so many ordinary records, made once."""
    path = rig.folder / f"plain-{seed}-{count}.ndjson"
    if not path.exists():
        corpus.plain(path, seed, count)
    return path
