"""The loop of a worker: find a job, plan it if nobody has, load a leased range; idle cheaply; stop gracefully.

Its clients are created here, after the fork. It works on one lease at a time, or on up to 16 of small objects; near the
end of a range it leases the next one.
"""

import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import pymongo
from setproctitle import setproctitle

from engine.control.ledger import Ledger
from engine.control.plans import Plans
from engine.control.queue import Queue
from engine.control.rejects import Rejects
from engine.control.rollup import RollUp
from engine.control.stats import REPORTER, Reporter, Stats
from engine.control.store import Store
from engine.control.wakeups import Wakeups
from engine.errors import HeadraceError, LeaseLost, Permanent, Transient
from engine.fleet.chooser import Chooser
from engine.fleet.heartbeat import Heartbeat
from engine.fleet.memory import Garbage
from engine.fleet.upkeep import Upkeep
from engine.load.keeper import KEEPER
from engine.load.lookout import Lookout
from engine.load.pipeline import Ended, Pipeline
from engine.load.planner import Planner
from engine.load.run import Run
from engine.load.window import MOST_TIMES
from engine.logs import get_logger, unexpected_translated
from engine.model import TERMINAL, Job, JobState, Stop
from engine.s3.client import connect
from engine.s3.direct import DirectUploads
from engine.s3.objects import Objects, warn_if_away
from engine.settings import Settings

__all__ = ["EXIT_NOW", "Worker", "WorkerIdentity"]

EXIT_NOW: Final = 4
"""This worker may still hold leases: its successor frees them, or they run out."""

LAST_SECONDS: Final = 3.0
"""Time limit for each of a stopping worker's last writes to the database: a service manager may not wait for long."""

BOOT_WAIT_SECONDS: Final = 2.0
"""The longest wait between tries to reach MongoDB at the start."""

log = get_logger()


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """A worker's identity, which its supervisor assigns at the fork.

    `boot` is a random string of its supervisor; `incarnation` counts the supervisor's forks; `predecessors` are names
    of dead workers whose leases it must free first; `parent` is the supervisor's pid.
    """

    host: str
    boot: str
    slot: int
    incarnation: int
    predecessors: tuple[str, ...]
    parent: int

    @property
    def name(self) -> str:
        """The name under which it holds leases; never used twice."""
        return f"{self.host}:{self.boot}:{self.slot}:{self.incarnation}"


class Worker:
    """The loop of one worker.

    Args:
        settings: those of the engine.
        identity: who it is.
        heartbeat: shows the supervisor that it is alive.
        stop: is set when the worker is to stop.

    Raises:
        StartError, Permanent: its clients can never be created.
        Transient: they could not be created, for a reason that may pass.
    """

    def __init__(
        self, settings: Settings, identity: WorkerIdentity, heartbeat: Heartbeat, stop: threading.Event
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._heartbeat = heartbeat
        self._stop = stop
        self._garbage = Garbage()
        self._store = Store(settings, MOST_TIMES * settings.engine_writers + 5, self._moved)
        self._ledger = Ledger(self._store, settings.engine_lease_seconds)
        self._queue = Queue(self._store, self._ledger)
        self._plans = Plans(self._store, self._queue, self._ledger)
        # One attempt per request: two would outlast a lease, and perhaps the watchdog.
        s3 = connect(settings, attempts=1)
        self._objects = Objects(s3, settings.aws_bucket_name or "")
        uploads = DirectUploads(self._store, s3, self._objects, settings.api_part_bytes)
        self._planner = Planner(
            self._store, self._queue, self._plans, self._ledger, self._objects, settings, heartbeat.touch
        )
        self._chooser = Chooser(
            self._queue, self._plans, self._ledger, self._planner, identity.name, stop, heartbeat.touch
        )
        self._stats = Stats()
        self._upkeep = Upkeep(
            self._store,
            self._ledger,
            self._queue,
            uploads,
            self._stats,
            settings.engine_keep_jobs_days,
            identity.name,
            stop,
            heartbeat.touch,
        )
        self._wakeups = Wakeups(self._store, stop)
        self._lookout = Lookout(self._look_ahead, self._paused)
        self._pipeline = Pipeline(
            settings,
            self._store,
            self._objects,
            self._ledger,
            RollUp(self._store, self._queue, self._ledger),
            Rejects(self._store, self._ledger),
            self._stats,
            still=heartbeat.age,
            report=self._report,
            near_end=self._lookout.begin,
            following=self._lookout.ready,
        )
        self._doing: dict[str, Any] = {}
        self._last_error = ""
        self._errors = 0

    def _moved(self) -> None:
        # The commands of these two threads are no sign that the work progresses.
        if threading.current_thread().name not in (KEEPER, REPORTER):
            self._heartbeat.touch()

    def loop(self) -> int:
        """Work until told to stop; returns the exit code."""
        if not self._boot():
            return 0
        self._garbage.exempt()
        reporter = Reporter(self._store, self._identity.name, self._identity.slot, self._stats, lambda: self._doing)
        reporter.start()
        while not self._stop.is_set():
            self._heartbeat.touch()
            try:
                with unexpected_translated("working on the queue"):
                    self._turn()
                self._last_error = ""
            except HeadraceError as error:
                self._errors += 1
                self._chooser.suspect_strays()
                self._log_once(error)
                if type(error) is Permanent:
                    # Perhaps the control database was dropped, and its indexes with it.
                    with suppress(HeadraceError):
                        self._store.prepare()
                self._stop.wait(random.uniform(0.5, 1.5))
        return self._leave(reporter)

    def _leave(self, reporter: Reporter) -> int:
        """Give back what is still leased, report the last figures, close everything; returns the exit code."""
        try:
            with unexpected_translated("giving back what was leased ahead"):
                if (ahead := self._lookout.take()) is not None:
                    with pymongo.timeout(LAST_SECONDS):
                        self._run_one(ahead)  # which gives it back, since `stop` is set
        except HeadraceError:
            self._chooser.suspect_strays()
        self._lookout.close()
        self._pipeline.close()
        self._planner.close()
        try:
            with pymongo.timeout(LAST_SECONDS):
                self._chooser.release_strays()
                reporter.report(last=True)
        except HeadraceError:
            return EXIT_NOW  # it may hold leases, which the successor frees
        finally:
            self._store.close()
        return 0

    def _turn(self) -> None:
        """Do what is due; then work on the next leases, or wait if there are none."""
        self._garbage.collect(self._errors + self._chooser.tried)
        self._upkeep.clean_up()
        ahead = self._found_ahead()
        if ahead is None:
            self._upkeep.see_to_due()
        waited = self._store.waited()
        found = self._chooser.take() if ahead is None else [ahead]
        if not found:
            self._wait()
        else:
            self._run(found)
            # This thread waits for the queue only, unless it writes documents itself.
            if not found[0].cautious:
                self._stats.add(seconds_queue=self._store.waited() - waited)

    def _look_ahead(self) -> Run | None:
        """Do what is due, and look for the next range, while this worker finishes one."""
        self._upkeep.see_to_due()
        for run in self._chooser.take(ahead=True):
            self._pipeline.expect(run)
            return run
        return None

    def _paused(self) -> bool:
        """Whether the queue is paused. Raises Transient soon: a worker that stops waits for the lookout's thread."""
        with pymongo.timeout(LAST_SECONDS):
            return self._queue.paused()

    def _found_ahead(self) -> Run | None:
        """The run that was leased ahead, if any; given back if the queue has been paused since. One that began a moment
        ago counts as under way, unless an error has kept it waiting."""
        began = time.perf_counter()
        run, paused = self._lookout.take(), False
        if run is not None:
            try:
                self._chooser.release_strays([run])
                paused = (run.ahead or self._last_error != "") and self._queue.paused()
            except HeadraceError:
                self._pipeline.forget(run)
                raise
        self._stats.add(seconds_queue=time.perf_counter() - began)  # including the wait for the lookout's thread
        if run is None or not paused:
            return run
        run.cancelled.set()
        self._run_one(run)
        return None

    def _boot(self) -> bool:
        """Reach MongoDB and free what the predecessors held; False if told to stop before that."""
        wait, released = 0.1, 0
        while not self._stop.is_set():
            self._heartbeat.touch()
            try:
                self._store.prepare()
                while freed := self._ledger.release(self._identity.predecessors):
                    released += len(freed)
                    self._upkeep.tell(freed, "died")
                self._plans.release_claims_of_dead(self._identity.predecessors)
                if self._identity.slot == 0 and self._store.standalone():
                    log.warning(
                        "this mongod is not a member of a replica set, so acknowledged writes are lost with it: "
                        "make it a replica set of one or more members (--replSet, then rs.initiate())",
                        action="boot",
                        worker=self._identity.name,
                    )
            except Transient as error:
                self._errors += 1
                self._garbage.collect(self._errors)  # MongoDB may be down for days
                self._log_once(error)
                self._stop.wait(wait)
                wait = min(wait * 2, BOOT_WAIT_SECONDS)
                continue
            self._heartbeat.mark_released()
            self._heartbeat.mark_booted()
            log.info("worker is ready", action="boot", worker=self._identity.name, released=released)
            if self._identity.slot == 0:  # one warns for all of them
                warn_if_away(self._objects)
            setproctitle(f"headrace: worker {self._identity.slot} idle")
            return True
        return False

    def _log_once(self, error: HeadraceError) -> None:
        if str(error) != self._last_error:
            self._last_error = str(error)
            log.warning(str(error), action="wait", worker=self._identity.name)

    def _run(self, runs: list[Run]) -> None:
        """Work on leases until they end, and end their jobs if nothing is left to do on them."""
        self._report(runs[0])
        try:
            if len(runs) == 1:
                self._run_one(runs[0])
            else:
                self._run_together(runs)
        finally:
            self._stats.add(ranges=len(runs))
            self._doing = {}
            setproctitle(f"headrace: worker {self._identity.slot} idle")

    def _run_one(self, run: Run) -> None:
        try:
            ended = self._pipeline.run(run)
        except HeadraceError as error:
            self._failed(run, error)
            return
        job = run.job
        if ended is Ended.DONE and job.plan is not None and job.plan.range_count == 1:
            job = self._queue.finish(job, run.mark()[1])
        if job.state in TERMINAL:
            self._log_end(job)
        elif ended is Ended.CANCELLED:
            self._call_off(job)
            self._log_end(self._queue.settle(job.id))
        else:
            self._settle(job)

    def _run_together(self, runs: list[Run]) -> None:
        outcomes, closed = self._pipeline.run_together(runs)
        # These first, since recording the outcome of the others may fail.
        done = [run for run, outcome in outcomes if outcome is Ended.DONE] if closed else []
        if done:
            for job in self._queue.finish_all([(run.job, run.mark()[1]) for run in done]):
                self._log_end(job)
        for run, outcome in outcomes:
            if isinstance(outcome, HeadraceError):
                self._failed(run, outcome)
            elif outcome is not Ended.DONE or not closed:
                self._log_end(self._queue.settle(run.job.id))

    def _failed(self, run: Run, error: HeadraceError) -> None:
        """Handle the error with which a lease ended."""
        job, index = run.job, run.lease.range.index
        context: dict[str, Any] = {"job": job.id, "range": index, "worker": self._identity.name}
        if isinstance(error, LeaseLost):
            self._stats.add(leases_lost=1)
            log.warning(str(error), action="lost", **context)
            self._settle(job)
        elif isinstance(error, Transient):
            self._chooser.suspect_strays()  # the range may not have been given back
            log.warning(str(error), action="postpone", **context)
            self._queue.note(job.id, f"range {index} put off: {error}")
            self._settle(job)
        else:
            log.error(str(error), action="fail", **context)
            self._call_off(job)
            self._queue.stop(job, Stop(JobState.FAILED, error.failure()))

    def _call_off(self, job: Job) -> None:
        """The job is being stopped: if a range of it is leased ahead, have it given back as soon as its turn comes."""
        if (run := self._lookout.holds(job.id)) is not None:
            run.cancelled.set()

    def _settle(self, job: Job) -> None:
        """End a job if this was the last of its ranges, which may have been given up, or be DONE although the reply was
        lost: under a stream of jobs of a higher priority nobody else would look at it for a long time."""
        # A job is not at its end while this worker has leased a range of it ahead.
        if self._lookout.holds(job.id) is None and not self._ledger.busy(job.id):
            self._log_end(self._queue.settle(job.id))

    def _log_end(self, job: Job) -> None:
        if job.state in TERMINAL:
            log.info("job ended", action="finish", state=job.state, job=job.id, worker=self._identity.name)

    def _report(self, run: Run) -> None:
        """Show what this worker does, in the process list and in its reports."""
        lease = run.lease
        size = max(lease.range.end - lease.range.start, 1)
        percent = min(100, 100 * (run.mark()[0] - lease.range.start) // size)
        self._doing = {"job": run.job.id, "fileKey": run.job.source.key, "range": lease.range.index, "percent": percent}
        setproctitle(f"headrace: worker {self._identity.slot} job {run.job.id} range {lease.range.index} {percent} %")

    def _wait(self) -> None:
        """Block until a wake-up comes or the poll interval has passed."""
        seconds = self._settings.engine_poll_seconds * random.uniform(0.75, 1.25)
        # The reply must come before the socket times out, and before the watchdog acts.
        seconds = min(seconds, self._settings.socket_timeout_seconds / 2)
        if self._wakeups.wait(seconds):
            self._chooser.awake()
