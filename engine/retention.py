"""The history of jobs: how long it is kept, and what is left of a job when it goes."""

from engine.errors import HeadraceError
from engine.jobs import LOADED
from engine.ledger import Ledger
from engine.logs import get_logger
from engine.model import TERMINAL
from engine.schema import ENDED_JOBS, PRUNED_JOBS
from engine.store import Document, Store, claims_of, jobs_of, translated

__all__ = ["Retention"]

log = get_logger()


class Retention:
    """Deletes jobs that have ended long ago.

    Args:
        store: the databases.
        ledger: the ranges of these jobs.
    """

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._store = store
        self._ledger = ledger

    def prune(self, days: float, most: int) -> int:
        """Delete the oldest of the jobs that ended so long ago, with their ranges and rejects; returns how many.

        What guards against loading a file twice stays: `sources` takes over what the job told. Safe to repeat, and to be
        killed within.
        One that cannot be deleted now is left to the next time.
        """
        since = {"$subtract": ["$$NOW", int(days * 86_400_000)]}
        ended: Document = {"state": {"$in": list(TERMINAL)}, "finishedAt": {"$type": "date"}}
        old = ended | {"$expr": {"$lt": ["$finishedAt", since]}}
        # Somebody began, and did not get to the end.
        begun: Document = {"pruned": True}
        jobs = self._store.jobs
        with translated("pruning old jobs"):
            left = list(jobs.find(begun).hint(PRUNED_JOBS).limit(most))
            more = list(jobs.find(old).hint(ENDED_JOBS).limit(most - len(left))) if len(left) < most else []
        count = 0
        for job, why in [*((job, begun) for job in left), *((job, old) for job in more)]:
            try:
                with translated("deleting an old job"):
                    count += self._prune(job, why)
            except HeadraceError as error:
                log.warning(str(error), action="prune", job=str(job["_id"]))
        return count

    def _prune(self, job: Document, why: Document) -> int:
        """Delete a job that is still as it was found; returns how many were deleted."""
        key, jobs, batches = job["_id"], self._store.jobs, self._store.batches
        # From here on it cannot be retried: a job whose ranges are half gone must not come back.
        if not jobs.update_one({"_id": key} | why, {"$set": {"pruned": True}}).matched_count:
            return 0
        self._keep_loaded(job)
        if "batch" in job:
            batches.update_one({"_id": job["batch"]}, {"$set": {"pruned": True}})
        self._ledger.delete(str(key))
        self._store.rejects.delete_many({"_id": {"$gte": {"job": key}, "$lt": {"job": key, "offset": ""}}})
        self._store.claims.delete_many(claims_of(key))
        deleted = jobs.delete_one({"_id": key, "pruned": True}).deleted_count
        if "batch" in job and not jobs.find_one(jobs_of(job["batch"]), {"_id": 1}):
            batches.delete_one({"_id": job["batch"]})
        return deleted

    def _keep_loaded(self, job: Document) -> None:
        """Write into its source that a job, which is about to be deleted, has loaded it."""
        if self._store.jobs.count_documents({"_id": job["_id"]} | LOADED, limit=1):
            here = {"collection": job["options"]["collection"], "database": job["database"]}
            query = {"tag": job["plan"]["tag"], "loads": {"$elemMatch": here}}
            self._store.sources.update_one(query, {"$max": {"loads.$.completedBy": job["_id"]}})
