"""The jobs that have not ended, as workers see them: page by page, for one database, and read-only."""

from collections.abc import Iterator
from typing import Final

from bson import ObjectId
from pymongo.collection import Collection

from engine.control.jobs import job_of
from engine.control.schema import BY_STATE, READY_JOBS, STOPPING_JOBS
from engine.control.store import Document, Store, translated
from engine.logs import get_logger
from engine.model import Job, JobState

__all__ = ["PAGE_JOBS", "OpenJobs"]

PAGE_JOBS: Final = 16
"""Jobs in a page: open jobs that a worker looks at together."""

log = get_logger()


class OpenJobs:
    """The open jobs of a database in pages, highest priority first, then oldest first."""

    def __init__(self, store: Store) -> None:
        self._jobs: Collection[Document] = store.jobs
        self._database = store.data.name
        self._strange: set[ObjectId] = set()

    def ready(self, holder: str = "") -> Iterator[list[Job]]:
        """Jobs that may have work, without those that someone other than `holder` has claimed for planning: there may
        be many of these at a time if they are small."""
        theirs = {"$and": [{"$gt": ["$planner.until", "$$NOW"]}, {"$ne": ["$planner.holder", holder]}]}
        due = {"$and": [{"$lte": ["$notBefore", "$$NOW"]}, {"$not": theirs}]}
        # A job that is being stopped has nothing to wait for, even if it was put off.
        query = {"waiting": None, "$or": [{"$expr": due}, {"stopping": {"$ne": None}}]}
        return self._pages(query, READY_JOBS)

    def stopping(self) -> Iterator[list[Job]]:
        """Jobs that are being stopped."""
        return self._pages({"stopping.to": {"$type": "string"}}, STOPPING_JOBS)

    def processing(self) -> Iterator[list[Job]]:
        """Jobs that have been planned."""
        return self._pages({"state": JobState.PROCESSING}, BY_STATE)

    def _pages(self, query: Document, hint: str) -> Iterator[list[Job]]:
        with translated("looking for jobs"):
            order = [("options.priority", -1), ("_id", 1)]
            mine: Document = {"open": True, "database": self._database}
            cursor = self._jobs.find(mine | query, batch_size=PAGE_JOBS).sort(order).hint(hint)
            page: list[Job] = []
            with cursor:
                for found in cursor:
                    if (job := self.read(found)) is not None:
                        page.append(job)
                    if len(page) == PAGE_JOBS:
                        yield page
                        page = []
            if page:
                yield page

    def read(self, found: Document) -> Job | None:
        """A job; None, logged once, if a later version wrote it and this one cannot read it."""
        try:
            return job_of(found)
        except (KeyError, TypeError, ValueError) as error:
            if found["_id"] not in self._strange:
                self._strange.add(found["_id"])
                log.error(
                    "a job cannot be read and is left to others: a later version of Headrace may have made it",
                    action="look",
                    job=str(found["_id"]),
                    cause=repr(error),
                )
            return None
