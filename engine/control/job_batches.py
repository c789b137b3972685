"""Batches: jobs that are submitted together, one for each of many objects, and their totals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from bson import ObjectId
from pymongo import UpdateOne
from pymongo.errors import DuplicateKeyError

from engine.control.admission import check_collection, check_ticket
from engine.control.jobs import Ticket, new_job
from engine.control.store import Document, Store, jobs_of, parse_id, translated, with_ticket, write_all
from engine.errors import NotFound
from engine.model import JobOptions, JobState, Source, Tally

__all__ = ["JobBatch", "JobBatches"]


@dataclass(frozen=True, slots=True)
class JobBatch:
    """Jobs submitted together: how many are in each state, the bytes of their files, the sum of their tallies.

    `pruned`: the history of some jobs is no longer kept, so only `count` includes them.
    """

    id: str
    created_at: datetime
    count: int
    pruned: bool
    states: dict[JobState, int]
    size: int
    tally: Tally


class JobBatches:
    """The batches of jobs.

    Args:
        store: the databases.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def redeem(self, ticket: Ticket) -> tuple[JobBatch, list[str]] | None:
        """The batch that was submitted with this ticket, if any, and those of its object keys that have no job because
        the caller died while submitting them. Raises KeyReused."""
        with translated("looking up an idempotency key"):
            found = self._store.batches.find_one(with_ticket(ticket.key))
        if found is None:
            return None
        check_ticket(found, ticket)
        batch = self.get(str(found["_id"]))
        if found.get("pruned"):
            return batch, []
        with translated("looking up the jobs of a batch"):
            there = {job["source"]["key"] for job in self._store.jobs.find(jobs_of(found["_id"]), {"source.key": 1})}
        return batch, [key for key in found["keys"] if key not in there]

    def submit(self, sources: Sequence[Source], options: JobOptions, ticket: Ticket | None = None) -> JobBatch:
        """Put a job for each source on the queue, together. Safe to repeat with the same ticket.

        Raises:
            Refused: the collection cannot take documents.
            KeyReused: the ticket's key was used with another request.
        """
        check_collection(self._store.data, options.collection)
        keys = {"$literal": [source.key for source in sources]}
        fields: Document = {"createdAt": "$$NOW", "count": len(sources), "keys": keys}
        if ticket is not None:
            fields["ticket"] = {"$literal": asdict(ticket)}
        with translated("submitting a batch of jobs"):
            try:
                key = ObjectId()
                self._store.batches.update_one({"_id": key}, [{"$set": fields}], upsert=True)
            except DuplicateKeyError:
                found = self._store.batches.find_one(with_ticket(ticket.key)) if ticket is not None else None
                if ticket is None or found is None:
                    raise
                check_ticket(found, ticket)
                # Objects that have appeared under its prefix since then do not belong to this batch.
                key, listed = found["_id"], set(found["keys"])
                sources = [source for source in sources if source.key in listed]
            there = {job["source"]["key"] for job in self._store.jobs.find(jobs_of(key), {"source.key": 1})}
            writes = [
                UpdateOne(
                    {"_id": ObjectId()},
                    [{"$set": new_job(source, options, self._store.data.name, {"batch": key})}],
                    upsert=True,
                )
                for source in sources
                if source.key not in there
            ]
            if writes:
                # Jobs that exist by now come from the same request, sent twice at the same time: they are skipped.
                write_all(self._store.jobs, writes)
        self._store.wake()
        return self.get(str(key))

    def get(self, batch_id: str) -> JobBatch:
        """A batch and the sums over its jobs; pruned jobs are included in `count` only. Raises NotFound."""
        key = parse_id(batch_id, "batch")
        total: Document = {name: {"$sum": f"$progress.tally.{name}"} for name in Tally().document()}
        stages: list[Document] = [
            {"$match": jobs_of(key)},
            {"$group": {"_id": "$state", "count": {"$sum": 1}, "size": {"$sum": "$source.size"}, **total}},
        ]
        with translated("summing a batch"):
            found = self._store.batches.find_one({"_id": key}, {"keys": 0})  # megabytes in a large batch
            groups = list(self._store.jobs.aggregate(stages)) if found else []
        if found is None:
            raise NotFound(f"there is no batch {batch_id}: it was never submitted here, or its history has been pruned")
        return JobBatch(
            str(key),
            found["createdAt"],
            found["count"],
            found.get("pruned", False),
            {JobState(group["_id"]): group["count"] for group in groups if group["_id"] in set(JobState)},
            sum(group["size"] for group in groups),
            sum((Tally.from_document(group) for group in groups), Tally()),
        )
