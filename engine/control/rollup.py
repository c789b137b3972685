"""Jobs that are being loaded: what the holders of their ranges have to know, and the sum of their numbers."""

from typing import Final

from pymongo import ReturnDocument
from pymongo.collection import Collection

from engine.control.budget import overspent
from engine.control.jobs import job_of, progress_document
from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.rejects import Rejects
from engine.control.store import Document, Store, job_key, translated
from engine.model import JobState, Stop

__all__ = ["RollUp"]

ROLL_UP_MS: Final = 600
"""A job's numbers are summed again when they are older than this, by whichever worker notices."""

_NEW: Final[Document] = {"$gte": ["$rolledAt", {"$subtract": ["$$NOW", ROLL_UP_MS]}]}
# A time in the future was written by a primary whose clock was ahead: it counts as stale.
_STALE: Final[Document] = {"$not": [{"$and": [_NEW, {"$lte": ["$rolledAt", "$$NOW"]}]}]}


class RollUp:
    """Sums up the ranges of jobs that are being loaded, and stops those that are over their budget or their time.

    Args:
        store: the databases.
        queue, ledger: the jobs and their ranges.
    """

    def __init__(self, store: Store, queue: Queue, ledger: Ledger) -> None:
        self._jobs: Collection[Document] = store.jobs
        self._queue = queue
        self._ledger = ledger
        self._rejects = Rejects(store, ledger)

    def tend(self, job_id: str) -> bool:
        """Sum up a job's numbers if that is due, and stop it if it is over its time; to be called by the holders of its
        ranges at each renewal. Returns whether it is being stopped; one that is gone or not PROCESSING counts as that."""
        stages: list[Document] = [
            {"$match": {"_id": job_key(job_id)}},
            {
                "$project": {
                    "stopping": 1,
                    "state": 1,
                    "overdue": {"$lt": [{"$ifNull": ["$deadline", "$$NOW"]}, "$$NOW"]},
                    "stale": _STALE,
                }
            },
        ]
        with translated("reading the signals of a job"):
            found = next(iter(self._jobs.aggregate(stages)), None)
        if found is None or found.get("stopping") or found["state"] != JobState.PROCESSING:
            return True
        if found["overdue"]:
            self._queue.stop_overdue()
        elif found["stale"]:
            self.roll_up(job_id)
        return bool(found["overdue"])

    def roll_up(self, job_id: str) -> None:
        """Sum the job's ranges into its progress, unless another worker has just done so; check its error budget."""
        key = job_key(job_id)
        elected = {"_id": key, "state": JobState.PROCESSING, "$expr": _STALE}
        with translated("summing a job"):
            found = self._jobs.find_one_and_update(
                elected, [{"$set": {"rolledAt": "$$NOW"}}], return_document=ReturnDocument.AFTER
            )
        if found is None:
            return
        job = job_of(found)
        if job.plan is None:
            return
        summary = self._ledger.summarize(job_id)
        seconds = {"$divide": [{"$subtract": ["$$NOW", "$progress.at"]}, 1000]}
        lately = {
            "$divide": [{"$subtract": [summary.tally.lines, "$progress.tally.lines"]}, {"$max": [seconds, 0.001]}]
        }
        summed = {"$gt": ["$progress.at", None]}
        blend = {"$avg": ["$progress.rate", {"$max": [lately, 0]}]}
        since_start = {"$divide": [{"$subtract": ["$$NOW", "$startedAt"]}, 1000]}
        first = {"$divide": [summary.tally.lines, {"$max": [since_start, 0.001]}]}
        progress = progress_document(summary.progress(job.plan.range_count)) | {
            "rate": {"$cond": [summed, blend, first]}
        }
        # A worker that was elected since then has a later sum.
        still = {"_id": key, "state": JobState.PROCESSING, "round": job.round, "rolledAt": found["rolledAt"]}
        changes = {"progress": progress, "errors": self._rejects.first_of(job_id, summary.tally)}
        with translated("summing a job"):
            self._jobs.update_one(still, [{"$set": changes}])
        if (failure := overspent(job.options, summary.tally, final=False)) is not None:
            self._queue.stop(job, Stop(JobState.FAILED, failure))
