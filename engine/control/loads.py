"""Other jobs that load the same version of an object, in the same format, into the same collection."""

from typing import Final

from engine.control.jobs import same_source
from engine.control.ledger import Ledger
from engine.control.schema import BY_VERSION
from engine.control.store import Document, Store, job_key, translated
from engine.model import Format, Job, JobState

__all__ = ["Loads"]

OTHERS: Final = 100
"""Other loads of the same object that are looked at: the latest ones."""


class Loads:
    """Finds other jobs that load the same version of an object, in the same format, into the same collection."""

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._jobs = store.jobs
        self._ledger = ledger

    def loaded_by(self, job: Job, format: Format) -> str | None:
        """The id of the latest job still kept that loaded the same source in this format into the same collection."""
        query = {
            **same_source(job.source),
            "plan.format": format,
            "options.collection": job.options.collection,
            "database": job.database,
            "state": JobState.COMPLETED,
            "options.validate": {"$ne": True},
            # A skipped job names the one that did load. A load repeated every minute leaves tens of thousands of them.
            "$or": [{"unread": None}, {"alreadyLoadedBy": {"$ne": None}}],
        }
        with translated("looking for earlier loads"):
            found = self._jobs.find_one(query, {"unread": 1, "alreadyLoadedBy": 1}, sort=[("_id", -1)], hint=BY_VERSION)
        if found is None:
            return None
        return str(found["alreadyLoadedBy"] if found.get("unread") else found["_id"])

    def others_may_load(self, job: Job, format: Format) -> bool:
        """Whether another job may yet write the same documents to the same collection: it is open or may be retried."""
        # Jobs that are being planned at the same time have no format yet.
        unfinished: Document = {"plan.format": {"$in": [format, None]}, "state": {"$ne": JobState.COMPLETED}}
        return bool(self._others(job, unfinished, 1))

    def others_loaded(self, job: Job, format: Format) -> bool:
        """Whether another job has written, or begun to write, the same documents into the same collection."""
        # Without skipped jobs: they have no ranges, and there may be more of them than `OTHERS`.
        return self._ledger.any_begun(self._others(job, {"plan.format": format, "unread": None}, OTHERS))

    def _others(self, job: Job, query: Document, most: int) -> list[str]:
        """The ids of other jobs that write the same documents to the same collection, the latest first."""
        if job.options.force:
            return []  # its documents have ids of their own
        query = {
            **same_source(job.source),
            "_id": {"$ne": job_key(job.id)},
            "options.collection": job.options.collection,
            "options.validate": {"$ne": True},
            "options.force": {"$ne": True},
            "database": job.database,
        } | query
        with translated("looking for other loads"):
            return [
                str(found["_id"])
                for found in self._jobs.find(query, {"_id": 1}, hint=BY_VERSION).sort("_id", -1).limit(most)
            ]
