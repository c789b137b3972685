"""A load that writes nothing: every line is read, parsed and judged as a load would, and the collection stays as it is.

What only an insert can tell is not told: the collection's validator, its unique indexes, and an own `_id` that comes
twice within the file.
"""

from typing import Any

import bson
from bson.errors import BSONError

from engine.model import Reason
from engine.sink import MAX_DOCUMENT_BYTES, Sink, Work, encode, unencodable
from engine.store import Document, translated

__all__ = ["DryRun"]

DEPTH_MOST = 180
"""How deep the server takes a document to be nested (measured on 6.0; it documents 100)."""


class DryRun(Sink):
    """Judges the batches of a job where a Sink writes them."""

    def _insert(self, work: Work) -> None:
        made = work.made()
        good = [index for index in range(len(made)) if not self._refused(work, index, made[index])]
        own_ids = set(work.documents.own_ids)
        asked = [index for index in good if not self._sole or index in own_ids]
        there: set[bytes] = set()
        if asked:
            with translated("looking for documents that are there already"):
                found = self._raw.find({"_id": {"$in": [made[index]["_id"] for index in asked]}}, {"_id": 1})
                there = {_identity(document["_id"]) for document in found}
        known = [index for index in asked if _identity(made[index]["_id"]) in there]
        work.inserted += len(good) - len(known)
        if known:
            error = {"keyPattern": {"_id": 1}, "errmsg": "another document has this _id"}
            self._duplicates(work, [(index, error) for index in known])

    def _refused(self, work: Work, index: int, document: Document) -> bool:
        line = work.documents.batch.line(work.documents.positions[index])
        try:
            size = len(encode(document))
        except (BSONError, OverflowError, RecursionError, UnicodeEncodeError) as error:
            work.refuse(index, *unencodable(error))
            return True
        own = document["_id"]
        if isinstance(own, list) or (isinstance(own, dict) and any(key.startswith("$") for key in own)):
            work.refuse(index, Reason.BAD_ID, "an _id is no array, and has no keys that begin with $")
        elif line.count(b"{") + line.count(b"[") > DEPTH_MOST and _depth(document) > DEPTH_MOST:
            work.refuse(index, Reason.TOO_DEEP, f"the document is nested deeper than {DEPTH_MOST} levels")
        elif size > MAX_DOCUMENT_BYTES:
            detail = f"the document has {size} bytes as BSON and MongoDB takes {MAX_DOCUMENT_BYTES}"
            work.refuse(index, Reason.TOO_LARGE, detail)
        else:
            return False
        return True


def _identity(value: object) -> bytes:
    return bson.encode({"": value})


def _depth(document: Document) -> int:
    deepest = 0
    level: list[tuple[Any, int]] = [(document, 1)]
    while level:
        item, depth = level.pop()
        deepest = max(deepest, depth)
        children = item.values() if isinstance(item, dict) else item
        level += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    return deepest
