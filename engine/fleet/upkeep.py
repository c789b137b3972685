"""Periodic work that any worker may do: expired leases, jobs to be started or stopped, and history to be deleted."""

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
"""The most jobs that a worker admits at a time when their start time has come."""

PRUNE_SECONDS: Final = 3600.0
"""About how often a worker looks for jobs whose history has been kept long enough, and for abandoned uploads."""

PRUNE_JOBS: Final = 200
"""The most jobs that a worker looks up for deletion at a time."""

PRUNING_SECONDS: Final = 1.0
"""About how long a worker deletes at a time, since jobs may be waiting."""

PRUNE_PAUSE: Final = 2
"""How long a worker pauses before it deletes more, as a multiple of the time that the last deletion took."""

SETTLE_SECONDS: Final = 5.0
"""About how often a worker looks for jobs that are being stopped and on which nobody works any more."""

DUE_SECONDS: Final = 1.0
"""About how often a worker does what is due."""

log = get_logger()


class Upkeep:
    """Does the periodic work of one worker.

    Args:
        store, ledger, queue, uploads, stats: the worker's.
        keep_days: how many days ended jobs and their rejects are kept.
        name: the worker's, for the log.
        stop: is set when the worker is to stop.
        moved: called as a sign of life.
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
        # When each is due next, in seconds of the monotonic clock.
        self._due_at = self._settle_at = self._prune_at = self._sweep_at = 0.0

    def see_to_due(self) -> None:
        """If it is time, free expired leases, admit jobs that may start, stop overdue ones, end those being stopped."""
        if time.monotonic() < self._due_at:
            return
        # Jitter, so that the workers of a fleet do not all ask at once.
        self._due_at = time.monotonic() + DUE_SECONDS * random.uniform(1, 1.5)
        if freed := self._ledger.expire():
            self._stats.add(leases_expired=len(freed))
            log.warning("leases ran out and were freed", action="expire", worker=self._name, ranges=len(freed))
            self._store.wake()
            self.tell(freed, "did not renew its lease")
        # Admit all of them before any is taken on, since the last may have the highest priority.
        while self._goes_on() and self._queue.admit_due(DUE_JOBS):
            self._store.wake()
        if stopped := self._queue.stop_overdue():
            log.warning("jobs ran for longer than allowed", action="timeout", worker=self._name, jobs=stopped)
        if time.monotonic() >= self._settle_at:
            self._settle_at = time.monotonic() + SETTLE_SECONDS * random.uniform(1, 1.5)
            # Whoever let go of a job's last range may not have known that it is being stopped, and under a stream of
            # jobs of a higher priority nobody would get to it.
            for page in self._queue.open_jobs.stopping():
                for job in page:
                    if not self._goes_on():
                        return
                    self._queue.settle(job.id)

    def clean_up(self) -> None:
        """Now and then, delete the history of old jobs and abort abandoned uploads."""
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
            # There may be hundreds of thousands of them, while jobs wait: continue soon, after a pause.
            now = time.monotonic()
            self._prune_at = now + PRUNE_PAUSE * (now - began)
            log.info("old jobs were deleted", action="prune", worker=self._name, jobs=pruned)

    def _sweep(self) -> None:
        if time.monotonic() < self._sweep_at:
            return
        self._sweep_at = time.monotonic() + PRUNE_SECONDS * random.uniform(0.75, 1.25)
        if swept := self._uploads.sweep(self._goes_on):
            log.info("unfinished uploads were aborted", action="prune", worker=self._name, uploads=swept)

    def tell(self, freed: Sequence[Freed], why: str) -> None:
        """Record in each job which of its ranges were freed and why; settles jobs that waited for nothing else."""
        for job_id, ranges in groupby(sorted(freed, key=lambda f: f.job_id), key=lambda f: f.job_id):
            first, *others = ranges
            more = f" and {len(others)} more" if others else ""
            self._queue.freed(job_id, f"range {first.index}{more} freed: {first.holder} {why}")

    def _goes_on(self) -> bool:
        """Whether to continue with work of many steps: not once the worker is to stop. Each call is a sign of life."""
        self._moved()
        return not self._stop.is_set()
