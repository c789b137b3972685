"""What a worker has done and where its time went: counters that only grow, told to the control database every few seconds.

`workers` holds one document for each live worker; `totals` the sums over all that there have ever been. Told without
waiting for a majority: a crash loses the last few seconds of these numbers, and of nothing else.
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
"""Name of the thread that tells."""

REPORT_SECONDS: Final = 2.0
"""How often it tells."""

LIVE_SECONDS: Final = 15.0
"""A worker that has told nothing for so long is not shown."""

STAGES: Final = ("read", "split", "decode", "encode", "wait", "stall", "drain", "queue", "backoff")
"""Seconds of a worker's threads: waiting for and reading bytes from S3; splitting lines; parsing; encoding batches; sending
them and waiting for the database to take them; the reader's wait for room among the batches under way, and, at the end of a
range, until the last of them is written; waiting for the database over jobs and ranges; and the pauses before what failed is
tried again."""

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
    """Tells of a worker, every two seconds.

    Args:
        store: where to.
        name: the worker's, as on its leases.
        slot: its place in its engine.
        stats: its counters.
        doing: what it does now: `job`, `range` and `percent`, or nothing.
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
            except Exception as error:  # numbers for people: the work goes on, and the next ones may come through
                log.exception("a worker's figures could not be told", action="report", cause=str(error))
            time.sleep(REPORT_SECONDS)

    def report(self, *, last: bool = False) -> None:
        """Tell now; what cannot be told is told the next time. `last`: the worker leaves, and nothing is told after that."""
        # Two at a time would both tell of the same. The last word is not worth a long wait.
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
                # Where the answer is lost, and that of the driver's second try, too, these two seconds are counted twice: they
                # are for people, and without them each outage would cost what was counted before it.
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
            pass  # numbers for people: the work goes on without


def _memory() -> dict[str, int]:
    """Resident bytes, now and at the peak."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 (read every two seconds)
        resident = int(file.read().split()[1]) * resource.getpagesize()
    # The kernel notes the peak now and then only.
    peak = max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"memory": resident, "memoryPeak": peak}


def live(store: Store) -> list[Document]:
    """What each worker that is alive told last, by name. Of one that was replaced a moment ago, its successor is there.

    `database` is the one whose jobs it works on.
    """
    recent = {"$expr": {"$gt": ["$at", {"$subtract": ["$$NOW", int(LIVE_SECONDS * 1000)]}]}}
    with translated("looking at the workers"):
        found = list(store.workers.find(recent).sort("at", 1))
    places = {place_of(worker): worker for worker in found}
    return sorted(places.values(), key=lambda worker: str(worker["_id"]))


def serving(workers: Sequence[Document], database: str) -> int:
    """How many of the workers work on the jobs of a database; those of an older version do not tell, and count."""
    return sum(worker.get("database", database) == database for worker in workers)


def place_of(worker: Document) -> str:
    """The engine and the place in it that a worker has: its name without the incarnation."""
    return str(worker["_id"]).rpartition(":")[0]


def totals(store: Store) -> dict[str, float]:
    """The counters summed over all workers that there have ever been."""
    with translated("summing over the workers"):
        found = store.totals.find_one({"_id": "totals"}, {"_id": 0})
    return dict(found or {})
