"""The history of jobs: deletes what has been kept long enough, except what guards against loading a file twice."""

from collections.abc import Callable
from typing import Final

from engine.control.jobs import LOADED
from engine.control.ledger import Ledger
from engine.control.schema import ENDED_JOBS, PRUNED_JOBS
from engine.control.store import Document, Store, claims_of, delete_slices, jobs_of, rejects_of, translated
from engine.errors import HeadraceError
from engine.logs import get_logger
from engine.model import TERMINAL

__all__ = ["Retention"]

ABANDONED_MS: Final = 60_000
"""A deletion that began this long ago and has not ended counts as abandoned: any worker may take it over."""

# The fields of a job that its deletion needs, without the rejects in its status: over hundreds of jobs, these add up.
_NEEDED: Final = {"batch": 1, "database": 1, "options": 1, "plan.tag": 1}

log = get_logger()


class Retention:
    """Deletes jobs that ended long ago.

    Args:
        store: the databases.
        ledger: the ranges of these jobs.
    """

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._store = store
        self._ledger = ledger

    def prune(self, days: float, most: int, goes_on: Callable[[], bool] = lambda: True) -> int:
        """Delete the oldest jobs that ended more than `days` ago, at most `most`, with their ranges and rejects.

        What guards against loading a file twice is moved to `sources`, which stays. Safe to repeat, and to be killed at
        any point. A job that cannot be deleted now is left to the next call, and so is the rest when `goes_on`, asked
        between two steps, returns False.

        Returns how many jobs were worked on: one with millions of rejects may take several calls.
        """
        since = {"$subtract": ["$$NOW", int(days * 86_400_000)]}
        ended: Document = {"state": {"$in": list(TERMINAL)}, "finishedAt": {"$type": "date"}}
        old = ended | {"pruned": None, "$expr": {"$lt": ["$finishedAt", since]}}
        # Somebody began to delete these, and did not finish.
        begun: Document = {"pruned": True, "$expr": {"$lt": ["$prunedAt", {"$subtract": ["$$NOW", ABANDONED_MS]}]}}
        jobs = self._store.jobs
        with translated("pruning old jobs"):
            left = list(jobs.find(begun, _NEEDED).hint(PRUNED_JOBS).limit(most))
            more = list(jobs.find(old, _NEEDED).hint(ENDED_JOBS).limit(most - len(left))) if len(left) < most else []
        count = 0
        for job, why in [*((job, begun) for job in left), *((job, old) for job in more)]:
            if count and not goes_on():
                break  # something is deleted of the first job, however long it took to find it
            try:
                with translated("deleting an old job"):
                    count += self._prune(job, why, goes_on)
            except HeadraceError as error:
                log.warning(str(error), action="prune", job=str(job["_id"]))
        return count

    def _prune(self, job: Document, why: Document, goes_on: Callable[[], bool]) -> bool:
        """Delete a job or a part of it; returns False if it has changed since, or somebody else is deleting it."""
        key, jobs = job["_id"], self._store.jobs
        # From here on it cannot be retried: a job whose ranges are half gone must not come back.
        begin = [{"$set": {"pruned": True, "prunedAt": "$$NOW"}}]
        if not jobs.update_one({"_id": key} | why, begin).matched_count:
            return False
        self._keep_loaded(job)
        if "batch" in job:
            self._store.batches.update_one({"_id": job["batch"]}, {"$set": {"pruned": True}})
        self._ledger.delete(str(key))
        parts = [(self._store.rejects, rejects_of(key))]
        if job["options"].get("validate"):
            parts.append((self._store.claims, claims_of(key)))
        if not all(delete_slices(collection, query, goes_on) for collection, query in parts):
            jobs.update_one({"_id": key}, {"$unset": {"prunedAt": ""}})  # anyone may continue at once
            return True
        # The batch is deleted before its last job, so that a crash in between leaves that job for the next try to find.
        # It is tried once more afterwards, since two workers may delete the last two jobs at the same time.
        self._drop_empty(job, {"_id": {"$ne": key}})
        jobs.delete_one({"_id": key, "pruned": True})
        self._drop_empty(job, {})
        return True

    def _drop_empty(self, job: Document, others: Document) -> None:
        """Delete the batch of a job if no jobs of the batch that match `others` are left."""
        if "batch" in job and not self._store.jobs.find_one(jobs_of(job["batch"]) | others, {"_id": 1}):
            self._store.batches.delete_one({"_id": job["batch"]})

    def _keep_loaded(self, job: Document) -> None:
        """Record in its source that a job has loaded it, before the job is deleted."""
        if self._store.jobs.count_documents({"_id": job["_id"]} | LOADED, limit=1):
            here = {"collection": job["options"]["collection"], "database": job["database"]}
            query = {"tag": job["plan"]["tag"], "loads": {"$elemMatch": here}}
            self._store.sources.update_one(query, {"$max": {"loads.$.completedBy": job["_id"]}})
