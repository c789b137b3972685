"""Reads for people who ask about jobs: lists of jobs, the ranges of a job, the length and age of the queue."""

import threading
import time
from dataclasses import dataclass
from typing import Final

from engine.control.jobs import job_or_conflict, job_or_none
from engine.control.schema import BY_FILE, BY_STATE, READY_JOBS, WAITING_JOBS
from engine.control.store import Document, Store, job_key, jobs_of, parse_id, ranges_of, translated
from engine.errors import Transient
from engine.model import Job, JobState, RangeState

__all__ = ["Backlog", "History", "RangeReport"]

HOLDERS_SHOWN: Final = 100
"""The most holders that a `RangeReport` names."""

CHEAP_SECONDS: Final = 0.05
"""A count of jobs that takes no longer than this is made afresh for every call."""

FIRST_SECONDS: Final = 5.0
"""How long a call waits for another call's count if there is no earlier count to return."""

NEXT_SECONDS: Final = 1.0
"""How long a call waits for another call's count if there is an outdated one to return."""

BACKLOG_FACTOR: Final = 20
"""A count slower than `CHEAP_SECONDS` is reused for this many times as long as it took: the history may hold millions
of jobs."""


@dataclass(frozen=True, slots=True)
class RangeReport:
    """A job's ranges: how many are in each state, their failures and deaths so far, and who has worked on them lately.

    `kept` counts the ranges whose lease has not expired: those of a host that died stay LEASED until a worker frees
    them. `put_off` is why the next READY range has to wait; None if one can be leased now or no range is READY.
    """

    states: dict[RangeState, int]
    kept: int
    failures: int
    deaths: int
    holders: tuple[str, ...]
    put_off: str | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """Jobs by state, and how many seconds the oldest job that is due but not begun has waited; 0 if there is none."""

    states: dict[JobState, int]
    oldest_seconds: float


class History:
    """Reads of the control database that no worker needs."""

    def __init__(self, store: Store) -> None:
        self._jobs = store.jobs
        self._ranges = store.ranges
        self._counting = threading.Lock()
        self._counted: Backlog | None = None
        self._good_until = 0.0

    def page(
        self,
        limit: int,
        *,
        before: str | None = None,
        state: JobState | None = None,
        key: str | None = None,
        collection: str | None = None,
        batch: str | None = None,
        bucket: str | None = None,
    ) -> list[Job]:
        """Jobs, newest first; those that this version cannot read are left out.

        Args:
            limit: the most to return.
            before: only jobs older than the one with this id.
            state, key, collection, batch, bucket: only jobs in this state, of this object key, into this collection, of
                this batch, of this bucket.

        Raises:
            NotFound: `before` or `batch` is not 24 hexadecimal digits.
        """
        query: Document = {}
        if before is not None:
            query["_id"] = {"$lt": job_key(before)}
        if state is not None:
            query["state"] = state
        if key is not None:
            query["source.key"] = key
        if bucket is not None:
            query["source.bucket"] = bucket
        if collection is not None:
            query["options.collection"] = collection
        if batch is not None:
            query |= jobs_of(parse_id(batch, "batch"))
        jobs: list[Job] = []
        while (left := limit - len(jobs)) > 0:
            with translated("listing jobs"):
                page = list(self._jobs.find(query).sort("_id", -1).limit(left))
            jobs += filter(None, map(job_or_none, page))
            if len(page) < left:
                break
            query["_id"] = {"$lt": page[-1]["_id"]}
        return jobs

    def ranges(self, job_id: str) -> RangeReport:
        """A report on the ranges of a job."""
        stages: list[Document] = [
            {"$match": ranges_of(job_key(job_id))},
            {
                "$group": {
                    "_id": "$state",
                    "count": {"$sum": 1},
                    "kept": {"$sum": {"$cond": [{"$gt": ["$until", "$$NOW"]}, 1, 0]}},
                    "failures": {"$sum": "$allFailures"},
                    "deaths": {"$sum": "$allDeaths"},
                    "holders": {"$addToSet": "$holders"},
                    # The range that can be leased first: one without `notBefore` sorts before any that waits.
                    "next": {
                        "$top": {"sortBy": {"notBefore": 1}, "output": {"at": "$notBefore", "failure": "$failure"}}
                    },
                }
            },
            {"$set": {"next.late": {"$gt": ["$next.at", "$$NOW"]}}},
        ]
        with translated("summing the ranges of a job"):
            groups = list(self._ranges.aggregate(stages))
        holders = sorted({holder for group in groups for names in group["holders"] for holder in names})
        late = [group["next"] for group in groups if group["_id"] == RangeState.READY and group["next"]["late"]]
        return RangeReport(
            {RangeState(group["_id"]): group["count"] for group in groups},
            sum(group["kept"] for group in groups),
            sum(group["failures"] for group in groups),
            sum(group["deaths"] for group in groups),
            tuple(holders[:HOLDERS_SHOWN]),
            (late[0].get("failure") or {}).get("message") if late else None,
        )

    def backlog(self) -> Backlog:
        """The length and age of the queue; if counting is slow, as they were a little while ago.

        Only one call counts at a time, and the others return the previous count, so that calls do not pile up when the
        database does not answer. Raises Transient.
        """
        if self._counted is not None and time.monotonic() < self._good_until:
            return self._counted
        if not self._counting.acquire(timeout=FIRST_SECONDS if self._counted is None else NEXT_SECONDS):
            if self._counted is None:
                raise Transient("the jobs are being counted for the first time, which takes a while: wait a moment")
            return self._counted
        try:
            began = time.monotonic()
            if self._counted is None or began >= self._good_until:
                self._counted = self._count()
                took = time.monotonic() - began
                self._good_until = began + took * BACKLOG_FACTOR if took > CHEAP_SECONDS else 0.0
            return self._counted
        finally:
            self._counting.release()

    def _count(self) -> Backlog:
        with translated("counting jobs"):
            # Covered by the index: no job is read.
            groups = self._jobs.aggregate([{"$group": {"_id": "$state", "count": {"$sum": 1}}}], hint=BY_STATE)
            states = {group["_id"]: group["count"] for group in groups}
            # A job has waited since it was submitted, its `runAt`, or its last retry, whichever came last.
            since = {"$max": ["$createdAt", "$options.runAt", "$retriedAt"]}
            age = {"$divide": [{"$subtract": ["$$NOW", since]}, 1000]}
            due = {"state": JobState.PENDING, "$expr": {"$lte": ["$notBefore", "$$NOW"]}}
            # The second finds jobs that are due but not yet admitted by a worker: there may be no worker.
            ways: dict[str, Document] = {READY_JOBS: {"open": True, "waiting": None}, WAITING_JOBS: {"waiting": True}}
            oldest = 0.0
            for hint, which in ways.items():
                stages: list[Document] = [{"$match": which | due}, {"$group": {"_id": None, "age": {"$max": age}}}]
                oldest = max([oldest, *(found["age"] for found in self._jobs.aggregate(stages, hint=hint))])
        return Backlog({state: states.get(state, 0) for state in JobState}, oldest)

    def open_job_of(self, bucket: str, key: str) -> Job | None:
        """An open job of an object, if there is one. Raises Conflict if this version cannot read it."""
        with translated("looking up the jobs of a file"):
            query = {"source.key": key, "source.bucket": bucket, "open": True}
            found = self._jobs.find_one(query, hint=BY_FILE)
        return None if found is None else job_or_conflict(found)
