"""What is due by the clock, whichever worker sees to it: leases that ran out, jobs that wait or run too long, and what is old."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final

from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.retention import Retention
from engine.control.stats import Stats
from engine.control.store import Store
from engine.logs import get_logger
from engine.model import Freed
from engine.s3.direct import DirectUploads

__all__ = ["Upkeep"]

DUE_JOBS: Final = 1000
"""Jobs whose time has come that a worker lets begin at a time."""

PRUNE_SECONDS: Final = 3600.0
"""How often, about, a worker looks for jobs whose history has been kept long enough."""

PRUNE_JOBS: Final = 200
"""Jobs that it looks up to delete at a time."""

PRUNING_SECONDS: Final = 1.0
"""How long it does so at a time, about: jobs may wait."""

PRUNE_PAUSE: Final = 2
"""How soon it goes on where there are more, as a multiple of the time that this took."""

SETTLE_SECONDS: Final = 5.0
"""How often, about, it looks for jobs that are to stop, and at which nobody is any more."""

DUE_SECONDS: Final = 1.0
"""How often, about, a worker sees to what is due by the clock."""

log = get_logger()


class Upkeep:
    """Sees to what is due, between the leases of one worker.

    Args:
        store, ledger, queue, uploads, stats: of the worker.
        keep_days: how long ended jobs and their rejects are kept.
        name: the worker's, for the log.
        stop: is set when the worker is to stop.
        moved: called whenever something moves.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        queue: Queue,
        uploads: DirectUploads,
        stats: Stats,
        keep_days: float,
        name: str,
        stop: threading.Event,
        moved: Callable[[], None],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._queue = queue
        self._retention = Retention(store, ledger)
        self._uploads = uploads
        self._stats = stats
        self._keep_days = keep_days
        self._name = name
        self._stop = stop
        self._moved = moved
        # When each is due next, seconds of the monotonic clock.
        self._due_at = self._settle_at = self._prune_at = self._sweep_at = 0.0

    def see_to_due(self) -> None:
        """See to what is due by the clock: leases that ran out, jobs that may begin, run for too long or are to stop."""
        if time.monotonic() < self._due_at:
            return
        # Apart, so that the workers of a fleet do not all ask at once.
        self._due_at = time.monotonic() + DUE_SECONDS * random.uniform(1, 1.5)
        if freed := self._ledger.expire():
            self._stats.add(leases_expired=len(freed))
            log.warning("leases ran out and were freed", action="expire", worker=self._name, ranges=len(freed))
            self._store.wake()
            self.tell(freed, "did not renew its lease")
        # All of them before any is taken on, since the last may be the one of the highest priority.
        while self._goes_on() and self._queue.admit_due(DUE_JOBS):
            self._store.wake()
        if stopped := self._queue.stop_overdue():
            log.warning("jobs ran for longer than they may", action="timeout", worker=self._name, jobs=stopped)
        if time.monotonic() >= self._settle_at:
            self._settle_at = time.monotonic() + SETTLE_SECONDS * random.uniform(1, 1.5)
            # Whoever let go of its last range may not have known that it is to stop, and nobody comes to it under a stream of
            # jobs of a higher priority.
            for page in self._queue.open_jobs.stopping():
                for job in page:
                    if not self._goes_on():
                        return
                    self._queue.settle(job.id)

    def clean_up(self) -> None:
        """Delete the history of old jobs, and abort uploads that nobody goes on with, now and then."""
        self._prune()
        self._sweep()

    def _prune(self) -> None:
        began = time.monotonic()
        if began < self._prune_at:
            return
        self._prune_at = began + PRUNE_SECONDS * random.uniform(0.75, 1.25)

        def goes_on() -> bool:
            return self._goes_on() and time.monotonic() - began < PRUNING_SECONDS

        if pruned := self._retention.prune(self._keep_days, PRUNE_JOBS, goes_on):
            # There may be hundreds of thousands, and jobs that wait.
            now = time.monotonic()
            self._prune_at = now + PRUNE_PAUSE * (now - began)
            log.info("old jobs are deleted", action="prune", worker=self._name, jobs=pruned)

    def _sweep(self) -> None:
        if time.monotonic() < self._sweep_at:
            return
        self._sweep_at = time.monotonic() + PRUNE_SECONDS * random.uniform(0.75, 1.25)
        if swept := self._uploads.sweep(self._goes_on):
            log.info("unfinished uploads were aborted", action="prune", worker=self._name, uploads=swept)

    def tell(self, freed: Sequence[Freed], why: str) -> None:
        """Tell the jobs whose ranges were freed, and why."""
        for job_id, ranges in groupby(sorted(freed, key=lambda f: f.job_id), key=lambda f: f.job_id):
            first, *others = ranges
            more = f" and {len(others)} more" if others else ""
            self._queue.freed(job_id, f"range {first.index}{more} freed: {first.holder} {why}")

    def _goes_on(self) -> bool:
        """Whether this worker is not told to stop; called within work of many steps, each of which shows that it lives."""
        self._moved()
        return not self._stop.is_set()
