"""Rejects in MongoDB: the lines that did not become documents, each with its offset and the reason.

A reject's `_id` is `{job, offset}`, so writing it again changes nothing. Each carries the number of its lease as a
fencing token: a holder deletes what earlier holders left from `confirmed` on, and never what a later one wrote.
"""

import base64
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bson import Int64
from pymongo import InsertOne

from engine.control.ledger import Ledger
from engine.control.store import Document, Store, job_key, rejects_of, translated, write_all
from engine.model import Job, Lease, Reject, Tally

__all__ = ["Rejects"]

FIRST_REJECTS: Final = 5
"""Rejects that a job's status shows."""

FIRST_RAW: Final = 1000
"""Characters of a raw line that a job's status shows; a multiple of four, since they may be base64."""

PAGE_BYTES: Final = 4 * 1024 * 1024
"""A page of rejects ends once its raw lines, as stored, add up to this many characters."""


class Rejects:
    """The rejects of all jobs."""

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._rejects = store.rejects
        self._ledger = ledger

    def write(self, job: Job, lease: Lease, rejects: Sequence[Reject]) -> None:
        """Store rejects, replacing what earlier holders wrote for the same lines. They are acknowledged by a majority
        on return."""
        documents = [_document(job, lease, reject) for reject in rejects]
        with translated("writing rejects"):
            result = write_all(self._rejects, [InsertOne(document) for document in documents])
            refused = [documents[fault["index"]] for fault in result["writeErrors"]]
            if there := {document["_id"]["offset"]: document for document in refused}:
                # Most are this lease's own, from a batch that is written again, and stay as they are.
                earlier = {"lease": {"$lt": lease.number}}
                ids = {"_id": {"$in": [document["_id"] for document in there.values()]}}
                for found in list(self._rejects.find(ids | earlier, {"_id": 1})):
                    self._rejects.replace_one({"_id": found["_id"]} | earlier, there[found["_id"]["offset"]])

    def forget(self, lease: Lease) -> None:
        """Delete what earlier holders of this range wrote from `confirmed` on: those lines are judged again."""
        job = job_key(lease.job_id)
        query = {
            "_id": {
                "$gte": {"job": job, "offset": Int64(lease.confirmed)},
                "$lt": {"job": job, "offset": Int64(lease.range.end)},
            },
            "lease": {"$lt": lease.number},
        }
        with translated("deleting unconfirmed rejects"):
            self._rejects.delete_many(query)

    def page(self, job_id: str, limit: int, after: int | None = None) -> tuple[list[Document], bool]:
        """Rejects of a job in file order, as clients see them, and whether there are more.

        Args:
            job_id: 24 hexadecimal digits.
            limit: the most to return; fewer are returned if their raw lines are long.
            after: only rejects whose line starts beyond this offset, in bytes.

        `line` is the 1-based line number, or None while a range before it is not DONE.
        """
        query = rejects_of(job_key(job_id))
        if after is not None:
            query["_id"]["$gt"] = {"job": job_key(job_id), "offset": Int64(after)}
        found: list[Document] = []
        size, more = 0, False
        with translated("reading rejects"), self._rejects.find(query).sort("_id", 1).limit(limit + 1) as cursor:
            for reject in cursor:
                if more := len(found) == limit or size >= PAGE_BYTES:
                    break
                found.append(reject)
                size += len(reject["raw"])
        if not found:
            return [], False
        before = self._ledger.first_lines(job_id, {reject["range"] for reject in found})
        return [_public(reject, before) for reject in found], more

    def first(self, job_id: str) -> list[Document]:
        """The first few rejects of a job as clients see them, with raw lines cut short."""
        return [_cut_short(reject) for reject in self.page(job_id, FIRST_REJECTS)[0]]

    def first_of(self, job_id: str, tally: Tally) -> Document:
        """The first rejects of a job with this tally, as an expression: they are kept in the job, so that its status
        takes no other read."""
        return {"$literal": self.first(job_id) if tally.rejected else []}

    def lines(self, job_id: str) -> Iterator[bytes]:
        """The raw line of every reject of a job, as far as it is kept, in file order."""
        with translated("reading rejects"):
            for found in self._rejects.find(rejects_of(job_key(job_id)), {"raw": 1, "encoding": 1}).sort("_id", 1):
                raw = found["raw"]
                yield base64.b64decode(raw) if "encoding" in found else raw.encode()


def _document(job: Job, lease: Lease, reject: Reject) -> Document:
    document: Document = {
        # Always 64 bits wide, so that offsets compare correctly whatever their size.
        "_id": {"job": job_key(job.id), "offset": Int64(reject.offset)},
        "fileKey": job.source.key,
        "etag": job.source.etag,
        "range": lease.range.index,
        "lease": lease.number,
        "ordinal": reject.ordinal,
        "length": reject.length,
        "reason": reject.reason,
        "detail": reject.detail,
    }
    if reject.code is not None:
        document["code"] = reject.code
    head = reject.head
    if reject.length > len(head):
        document["rawLength"] = reject.length
        # The cut may have split a character.
        for spare in range(4):
            if _is_text(head[: len(head) - spare]):
                head = head[: len(head) - spare]
                break
    if _is_text(head):
        document["raw"] = head.decode()
    else:
        document["raw"], document["encoding"] = base64.b64encode(head).decode(), "base64"
    return document


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cut_short(reject: Document) -> Document:
    if len(reject["raw"]) <= FIRST_RAW:
        return reject
    return reject | {"raw": reject["raw"][:FIRST_RAW], "rawLength": reject["length"]}


def _public(found: Document, before: dict[int, int]) -> Document:
    first = before.get(found["range"])
    reject: dict[str, Any] = {
        "line": None if first is None else first + found["ordinal"] + 1,
        "offset": found["_id"]["offset"],
        "length": found["length"],
        "reason": found["reason"],
        "detail": found["detail"],
        "raw": found["raw"],
    }
    return reject | {name: found[name] for name in ("encoding", "rawLength", "code") if name in found}
