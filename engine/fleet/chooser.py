"""Chooses a worker's next work: looks at the queue and leases a range of some job, or several small jobs."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from engine.control.ledger import HELD_SECONDS, Ledger
from engine.control.plans import Plans
from engine.control.queue import Queue
from engine.errors import HeadraceError, Transient, Unexpected
from engine.load.planner import SMALL_BYTES, Planner, Prepared
from engine.load.run import Run
from engine.logs import get_logger, unexpected_translated
from engine.model import TERMINAL, Job, JobState, Lease, Source, Stop
from engine.steps import Step, reach

__all__ = ["Chooser"]

MAX_TOGETHER: Final = 16
"""The most small jobs that a worker takes on together."""

BARREN_SECONDS: Final = 700.0
"""The longest that a job is passed over because all its ranges are put off; no range is put off for longer. After an
outage there may be thousands of such jobs, and each look at one takes two round trips."""

SETTLE_SECONDS: Final = 20.0
"""How often a worker looks, while the queue is paused, for jobs that only have to be ended."""

LOOK_SECONDS: Final = 0.5
"""How long jobs seen in one look at the queue may be taken without looking again."""

log = get_logger()


class Chooser:
    """Takes leases for one worker.

    Args:
        queue, plans, ledger, planner: the jobs, their plans and ranges, and what plans them.
        holder: the worker's name.
        stop: is set when the worker is to stop.
        moved: called as a sign of life.

    `tried` counts the jobs that it has tried to take on.
    """

    def __init__(
        self,
        queue: Queue,
        plans: Plans,
        ledger: Ledger,
        planner: Planner,
        holder: str,
        stop: threading.Event,
        moved: Callable[[], None],
    ) -> None:
        self.tried = 0
        self._queue = queue
        self._plans = plans
        self._ledger = ledger
        self._planner = planner
        self._holder = holder
        self._stop = stop
        self._moved = moved
        self._looked_at = 0.0
        self._settled_at = float("-inf")
        self._seen: deque[Job] = deque()
        self._barren: dict[tuple[str, int], float] = {}  # until when a job, in its round, has nothing to lease
        self._may_hold_strays = False

    def suspect_strays(self) -> None:
        """After an error, the worker may hold leases that it does not know of: free them before it takes others."""
        self._may_hold_strays = True

    def awake(self) -> None:
        """After a wake-up: look again at jobs whose ranges others held a moment ago."""
        soon = time.monotonic() + HELD_SECONDS
        self._barren = {of: until for of, until in self._barren.items() if until > soon}

    def release_strays(self, held: Sequence[Run] = ()) -> None:
        """If strays are suspected, free the worker's leases except those of `held`. Still suspected after Transient."""
        if self._may_hold_strays:
            self._ledger.release_strays(self._holder, [run.lease.token for run in held])
            self._may_hold_strays = False

    def take(self, *, ahead: bool = False) -> list[Run]:
        """Take a lease on a range of some job, or leases on the only ranges of several small jobs; returns none if
        there is nothing to do now.

        `ahead`: the worker is still at work, so no lease that it holds may be freed. It takes at most one lease, and
        none if the next job has to be planned: if the worker died meanwhile, that job would be blamed.
        """
        if not ahead:
            self.release_strays()
        elif self._may_hold_strays:
            return []
        if self._queue.paused():
            self._seen.clear()
            if not ahead:
                self._settle_while_paused()
            return []
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            # The rest of the last look is still fresh enough, since every step is a compare-and-set.
            runs = self._first_seen(ahead)
            if runs or self._seen:
                return runs
        return self._look(ahead)

    def _look(self, ahead: bool) -> list[Run]:
        """Look at the queue page by page, and take work from the first page that has some."""
        self._looked_at = time.monotonic()
        self._seen.clear()
        self._barren = {of: until for of, until in self._barren.items() if until > time.monotonic()}
        for whole in self._queue.open_jobs.ready(self._holder):
            page = [job for job in whole if job.stopping is not None or (job.id, job.round) not in self._barren]
            if not page:
                continue
            leased = self._ledger.leased(job.id for job in page if job.plan is not None)
            # Workers that look at the same page begin with different jobs.
            random.shuffle(page)
            # Within a priority, jobs with the fewest workers go first, so that a huge file does not hold up small ones.
            page.sort(key=lambda job: (-job.options.priority, leased.get(job.id, 0)))
            self._seen = deque(job for job in page if not _all_held(job, leased.get(job.id, 0)))
            runs = self._first_seen(ahead)
            if runs or self._seen:
                return runs
        return []

    def _first_seen(self, ahead: bool) -> list[Run]:
        """Take work from the first of the jobs seen that has some. If it returns none, jobs are left only because the
        worker is to stop, or because it looks ahead and the next job has to be planned."""
        while self._seen and not self._stop.is_set():
            self._moved()
            if ahead and self._seen[0].state is JobState.PENDING:
                break
            if runs := self._enter(self._seen.popleft(), ahead=ahead):
                return runs
        return []

    def _settle_while_paused(self) -> None:
        """End the jobs that have nothing left to do: whoever closed the last range may have died before ending them."""
        if time.monotonic() - self._settled_at < SETTLE_SECONDS:
            return  # there may be thousands of jobs
        self._settled_at = time.monotonic()
        for page in self._queue.open_jobs.processing():
            for job in page:
                if self._stop.is_set():
                    return
                if self._ledger.idle_seconds(job.id, BARREN_SECONDS) is None:
                    self._queue.settle(job.id)

    def _enter(self, job: Job, *, ahead: bool) -> list[Run]:
        self.tried += 1
        if job.stopping is not None:
            self._queue.settle(job.id)
            return []
        head = b""
        if job.state is JobState.PENDING:
            prepared = self._prepare([job, *self._small_ones_like(job)])
            runs = [self._begun(p.job, p.lease, p.head) for p in prepared if p.lease is not None]
            if runs or len(prepared) != 1 or prepared[0].job.state in TERMINAL:
                return runs
            job, head = prepared[0].job, prepared[0].head
        lease = self._ledger.lease(job.id, self._holder, ahead=ahead)
        if lease is None:
            seconds = self._ledger.idle_seconds(job.id, BARREN_SECONDS)
            if seconds is None:
                self._queue.settle(job.id)
            elif seconds > 0:
                self._barren[job.id, job.round] = time.monotonic() + seconds
            return []
        # Read after the lease: an earlier request to stop the job is seen here, a later one by the keeper.
        job = self._queue.get(job.id)
        if job.stopping is not None or job.state is not JobState.PROCESSING:
            self._ledger.give_back(lease, lease.confirmed, lease.tally)
            self._queue.settle(job.id)
            return []
        return [self._begun(job, lease, head, ahead=ahead)]

    def _begun(self, job: Job, lease: Lease, head: bytes, *, ahead: bool = False) -> Run:
        reach(Step.LEASED)
        return Run(job, lease, self._stop, self._moved, head, ahead=ahead)

    def _small_ones_like(self, job: Job) -> list[Job]:
        """Other small jobs from the last look at the queue to take along with a small one: alone, each would spend its
        time waiting for the database's journal.

        A job whose planners died goes alone, since it may kill the next planner, too. Of several jobs that load the
        same object into the same collection, only one goes along, so that the later ones learn of its load.
        """
        together = [job]
        places = {_place(job)}
        for other in list(self._seen) if _may_go_along(job) else ():
            if len(together) == MAX_TOGETHER:
                break
            like = other.options.priority == job.options.priority and _may_go_along(other)
            if like and _place(other) not in places:
                places.add(_place(other))
                together.append(other)
                self._seen.remove(other)
        return together[1:]

    def _prepare(self, jobs: list[Job]) -> list[Prepared]:
        """Plan the jobs that nobody else is about to plan; those that cannot be planned are put off or stopped."""
        jobs = self._plans.claim(jobs, self._holder)
        if not jobs:
            return []
        prepared = self._planned(jobs)
        for job, trouble in ((p.job, p.error) for p in prepared):
            if trouble is None:
                continue
            (log.warning if isinstance(trouble, Transient) else log.error)(
                str(trouble), action="plan", job=job.id, worker=self._holder
            )
            try:
                if isinstance(trouble, Transient):
                    self._plans.postpone(job, trouble.failure(), spend=trouble.spends)
                else:
                    self._queue.stop(job, Stop(JobState.FAILED, trouble.failure()))
            except HeadraceError as error:
                # The other jobs are leased by now. This one is planned again once the claim on it has lapsed.
                log.warning(str(error), action="plan", job=job.id, worker=self._holder)
        return [p for p in prepared if p.error is None]

    def _planned(self, jobs: Sequence[Job]) -> list[Prepared]:
        try:
            with unexpected_translated("planning jobs"):
                return self._planner.prepare(jobs, self._holder)
        except HeadraceError as error:
            self.suspect_strays()
            if len(jobs) == 1 or (isinstance(error, Transient) and not isinstance(error, Unexpected)):
                return [Prepared(job, error=error) for job in jobs]
        # Plan each job by itself, to find the one at fault.
        return [prepared for job in jobs for prepared in self._planned([job])]


def _all_held(job: Job, leased: int) -> bool:
    """Whether every range of a job is DONE or leased, so that there is none to take.

    A range that was DONE when the job was read stays DONE, so it is not among those leased now. A job without leases is
    not passed over: it may have to be settled.
    """
    if job.stopping is not None or job.plan is None or not leased:
        return False
    return leased + job.progress.ranges_done >= job.plan.range_count


def _may_go_along(job: Job) -> bool:
    """Whether a job is small and has had no trouble so far, so that it may be loaded together with others."""
    small = job.source.size <= SMALL_BYTES
    trouble = job.stopping is not None or job.planner_deaths or job.attempts
    return small and job.state is JobState.PENDING and not trouble


def _place(job: Job) -> tuple[Source, str]:
    return job.source, job.options.collection
