"""The steps of a scenario: put a file into S3, submit its job, run engines, inject faults, wait, run the checker."""

import io
import os
import signal
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bson import ObjectId

from engine.control.jobs import Ticket
from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.store import Store
from engine.model import TERMINAL, JobOptions
from engine.s3.client import connect
from engine.s3.objects import Objects
from engine.settings import Settings
from tests.chaos import corpus
from tests.chaos.checker import check
from tests.running import Running, patiently, title

HEAVY = {
    "engine_lease_seconds": 3,
    "engine_watchdog_seconds": 7,
    "engine_poll_seconds": 0.2,
    "engine_grace_seconds": 20,
}
"""Settings with which leases run out, and hung workers are noticed, within seconds."""


@dataclass
class Report:
    """What one scenario did and found. It passed if every kind of fault was injected and there is no problem."""

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
        # The engines are impatient, what looks at them is not: a database that stands still for seconds is no finding.
        self.store = Store(settings)
        patiently(self.store.prepare)
        self.queue = Queue(self.store, Ledger(self.store, self.settings.engine_lease_seconds))
        self.s3 = connect(settings)
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
        """Start a supervisor with its workers; returns it once they have booted, or at once without `ready`."""
        given = HEAVY | {"engine_workers": 2, "engine_range_bytes": "1MiB"} | changes
        made = Running("engine", self.settings, self.folder / f"{uuid.uuid4().hex}.log", module, **given)
        self._stack.callback(made.end)
        if ready:
            made.ready(int(given["engine_workers"]))
        return made

    def submit(self, path, **options):
        """Put a file into S3 and submit its job, by default with a collection of its own."""
        with path.open("rb") as content:
            source = self.objects.upload(content, f"{uuid.uuid4().hex}-{path.name}")
        asked = JobOptions(**{"collection": f"c{uuid.uuid4().hex[:8]}", "max_errors": 10**9} | options)
        ticket = Ticket(uuid.uuid4().hex, "")  # so that it can be submitted again after an error
        return patiently(lambda: self.queue.submit(source, asked, ticket))

    def submit_small(self, path, count):
        """Submit `count` jobs, each for its own copy of the file; workers load small ones together."""
        return [self.submit(path) for _ in range(count)]

    def overwrite(self, job, data=b'{"other":1}\n'):
        self.objects.upload(io.BytesIO(data), job.source.key)

    def ended(self, job):
        """Whether a job has ended."""
        return patiently(lambda: self.queue.get(job.id)).state in TERMINAL

    def under_way(self, *jobs, seconds=240, pause=0.1):
        """Yield every `pause` seconds until these jobs have ended. Raises AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while not all(map(self.ended, jobs)):
            if time.monotonic() > end:
                raise AssertionError(f"not ended within {seconds} s: {[self.queue.get(job.id) for job in jobs]}")
            yield
            time.sleep(pause)

    def wait(self, *jobs, seconds=240):
        """Wait until these jobs have ended; returns them."""
        for _ in self.under_way(*jobs, seconds=seconds):
            pass
        return [patiently(partial(self.queue.get, job.id)) for job in jobs]

    def busy(self, jobs):
        """Whether any of these jobs has not ended: only then does a fault count."""
        return not all(map(self.ended, jobs))

    def keep_busy(self, path, jobs):
        """If all of these jobs have ended, submit another for this file, so that there is always a load to break."""
        if not self.busy(jobs):
            jobs.append(self.submit(path))

    def turns(self, faults, kind, wanted):
        """Yield until a fault of this kind was injected `wanted` times. Gives up after five times as many turns."""
        for _ in range(5 * wanted):
            if faults[kind] >= wanted:
                return
            yield

    def settle(self, report, path, jobs):
        """Wait for these jobs, all for one file, and verify each."""
        self.wait(*jobs)
        for job in jobs:
            self.verify(report, path, job)

    def verify(self, report, path, job, state="COMPLETED", **more):
        """Have the checker verify a job that has ended; problems go into the report, `more` to the checker."""
        job = patiently(lambda: self.queue.get(job.id))
        if job.state != state:
            report.problems.append(f"job is {job.state}, not {state}: {job.failure}")
            return
        if held := patiently(lambda: self.store.ranges.count_documents({"state": "LEASED"})):
            report.problems.append(f"{held} leases are still held")
        verdict = patiently(lambda: self._verdict(path, job, **more))
        report.records += job.progress.tally.lines
        if not verdict.passed:
            report.problems.append(str(verdict))

    def _verdict(self, path, job, **more):
        key, lines, before = ObjectId(job.id), 0, {}
        for found in self.store.ranges.find({"job": key}).sort("_id", 1):
            before[found["_id"]["index"]] = lines
            lines += found["tally"]["lines"]
        with path.open("rb") as stream:
            return check(
                stream,
                self.store.data[job.options.collection],
                self.store.rejects.find({"_id.job": key}),
                job.progress.tally.document(),
                job.plan.tag,
                before,
                job.plan.max_line_bytes,
                **more,
            )

    def holders(self, engine):
        """Pids of this engine's workers that hold a lease now; no other engine may hold one."""
        slots = {found["holder"].split(":")[2] for found in self.store.ranges.find({"state": "LEASED"}, {"holder": 1})}
        return [pid for pid in engine.workers() if any(f"worker {slot} job" in title(pid) for slot in slots)]


def kill(pid, number=signal.SIGKILL):
    """Send a signal; returns whether the process existed."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def patience(seconds, short):
    """How long to wait for what the engine promises within `seconds`: the short version may share a slow machine."""
    return 120 if short else seconds


def made(rig, count, seed=1):
    """A file of `count` ordinary records, written on first use."""
    path = rig.folder / f"plain-{seed}-{count}.ndjson"
    if not path.exists():
        corpus.plain(path, seed, count)
    return path
