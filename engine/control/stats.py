"""What a worker has done and where its time went: counters that only grow, reported to the control database.

`workers` holds one document for each live worker; `totals` the sums over all workers there have ever been. Reports do
not wait for a majority: a crash loses the last few seconds of these numbers, and nothing else.
"""

import os
import resource
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

from pymongo import WriteConcern
from pymongo.errors import PyMongoError

from engine.control.store import Document, Store, literals, translated
from engine.logs import get_logger

__all__ = ["REPORTER", "REPORT_SECONDS", "STAGES", "Reporter", "Stats", "live", "place_of", "serving", "totals"]

REPORTER: Final = "reporter"
"""Name of the thread that reports."""

REPORT_SECONDS: Final = 2.0
"""How often a worker reports."""

LIVE_SECONDS: Final = 15.0
"""A worker that has not reported for this long is not shown."""

STAGES: Final = ("read", "split", "decode", "encode", "wait", "stall", "drain", "queue", "backoff")
"""Where the seconds of a worker's threads go, in this order: waiting for and reading bytes from S3; splitting lines;
parsing; encoding batches; sending them and waiting for MongoDB to acknowledge them; the reader's wait for room among
the batches in flight; its wait at the end of a range until the last batch is written; waiting for MongoDB over jobs and
ranges; and the backoff before retries."""

log = get_logger()


class Stats:
    """Counters of one worker, by name. Safe to use from its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)

    def add(self, **amounts: float) -> None:
        """Add each amount to the counter of that name."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def counts(self) -> dict[str, float]:
        """All counters as they are now."""
        with self._lock:
            return dict(self._counts)


class Reporter(threading.Thread):
    """Reports on a worker every `REPORT_SECONDS`.

    Args:
        store: where the reports go.
        name: the worker's name, as on its leases.
        slot: its place in its engine.
        stats: its counters.
        doing: returns what it is working on: `job`, `fileKey`, `range` and `percent`, or nothing.
    """

    def __init__(self, store: Store, name: str, slot: int, stats: Stats, doing: Callable[[], dict[str, Any]]) -> None:
        super().__init__(name=REPORTER, daemon=True)
        quick = WriteConcern(1)
        self._workers = store.workers.with_options(write_concern=quick)
        self._totals = store.totals.with_options(write_concern=quick)
        self._holder = name
        self._fixed = {
            "slot": slot,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "database": store.data.name,
        }
        self._stats = stats
        self._doing = doing
        self._reported: dict[str, float] = {}
        self._reported_at = time.monotonic()
        self._reporting = threading.Lock()
        self._left = False

    def run(self) -> None:
        """The thread's loop."""
        while True:
            try:
                self.report()
            except Exception as error:  # numbers for people only: work continues, and the next report may succeed
                log.exception("a worker's figures could not be reported", action="report", cause=str(error))
            time.sleep(REPORT_SECONDS)

    def report(self, *, last: bool = False) -> None:
        """Report now; what fails is left to the next report. `last`: the worker leaves, and reports no more."""
        # Two at a time would both report the same amounts. The last report is not worth a long wait.
        if not self._reporting.acquire(timeout=REPORT_SECONDS if last else -1):
            return
        try:
            if not self._left:
                self._left = last
                self._report(last)
        finally:
            self._reporting.release()

    def _report(self, last: bool) -> None:
        counts = self._stats.counts()
        now = time.monotonic()
        news = {name: value - self._reported.get(name, 0) for name, value in counts.items()}
        news = {name: value for name, value in news.items() if value}
        rate = news.get("lines", 0) / max(now - self._reported_at, 0.001)
        try:
            if news:
                # If both this answer and that of the driver's retry are lost, these amounts are counted twice. The
                # numbers only inform people, and otherwise every outage would lose what was counted before it.
                self._totals.update_one({"_id": "totals"}, {"$inc": news}, upsert=True)
                self._reported = counts
            self._reported_at = now
            if last:
                self._workers.delete_one({"_id": self._holder})
                return
            document: Document = self._fixed | {
                "counts": counts,
                "rate": round(rate, 1),
                **_memory(),
                "doing": self._doing(),
            }
            self._workers.update_one(
                {"_id": self._holder}, [{"$set": literals(document) | {"at": "$$NOW"}}], upsert=True
            )
        except PyMongoError:
            pass  # numbers for people only: work continues without them


def _memory() -> dict[str, int]:
    """Resident memory in bytes, now and at its peak."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 (read every two seconds)
        resident = int(file.read().split()[1]) * resource.getpagesize()
    # The kernel updates the peak only now and then.
    peak = max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"memory": resident, "memoryPeak": peak}


def live(store: Store) -> list[Document]:
    """The last report of each live worker, sorted by name; of a worker that was just replaced, only its successor's.

    `database` is the one whose jobs the worker works on.
    """
    recent = {"$expr": {"$gt": ["$at", {"$subtract": ["$$NOW", int(LIVE_SECONDS * 1000)]}]}}
    with translated("listing the workers"):
        found = list(store.workers.find(recent).sort("at", 1))
    places = {place_of(worker): worker for worker in found}
    return sorted(places.values(), key=lambda worker: str(worker["_id"]))


def serving(workers: Sequence[Document], database: str) -> int:
    """How many workers work on the jobs of a database. Those of older versions, which do not report it, are counted."""
    return sum(worker.get("database", database) == database for worker in workers)


def place_of(worker: Document) -> str:
    """The engine of a worker and its slot there: its name without the incarnation."""
    return str(worker["_id"]).rpartition(":")[0]


def totals(store: Store) -> dict[str, float]:
    """The counters summed over all workers there have ever been."""
    with translated("reading the workers' totals"):
        found = store.totals.find_one({"_id": "totals"}, {"_id": 0})
    return dict(found or {})
