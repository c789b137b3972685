"""A load that writes nothing to its collection: every line is read, parsed and judged as a load would judge it.

What only an insert would tell is found out beside it: the collection's validator is asked about documents that are sent along
with the question, and what must be unique is claimed in the control database, so that lines which fight over a key are told
whichever workers read them. Not told: conflicts on unique indexes with options of their own, or over arrays.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import bson
from bson import Binary
from bson.errors import BSONError
from pymongo import InsertOne
from pymongo.errors import DocumentTooLarge, OperationFailure

from engine.model import Plan, Reason
from engine.sink import Sink, Work, encode, too_large, unencodable
from engine.store import DUPLICATE_KEY, TRANSIENT_CODES, Document, Store, job_key, translated, write_all

__all__ = ["DryRun"]

DEPTH_MOST: Final = 180
"""How deep the server takes a document to be nested (measured on 6.0; it documents 100)."""

VALIDATION_FAILED: Final = 121
_MISSING: Final = object()


class DryRun(Sink):
    """Judges the batches of a job where a Sink writes them.

    Args:
        job_id: under which keys are claimed; the other arguments are those of a Sink.
    """

    def __init__(self, store: Store, collection: str, plan: Plan, write_timeout_seconds: float, job_id: str) -> None:
        super().__init__(store, collection, plan, write_timeout_seconds)
        self._job = job_key(job_id)
        self._claims = store.claims
        self._judge: tuple[Document | None, list[list[str]]] | None = None

    def _insert(self, work: Work) -> None:
        made = work.made()
        left = [index for index in range(len(made)) if not self._refused(work, index, made[index])]
        validator, unique = self._judged_by()
        if validator:
            left = self._valid(work, made, left, validator)
        known = self._known(work, made, left)
        if known:
            error = {"keyPattern": {"_id": 1}, "errmsg": "another document has this _id"}
            self._duplicates(work, [(index, error) for index in known])
            left = [index for index in left if index not in known]
        own_ids = set(work.documents.own_ids)
        claims = [(index, "_id", made[index]["_id"]) for index in left if index in own_ids]
        for index in self._lost(made, claims):
            work.refuse(index, Reason.DUPLICATE_KEY, "another line of the file has this _id", DUPLICATE_KEY)
            left.remove(index)
        for fields in unique:
            for index in self._taken(made, left, fields):
                detail = f"another document has its values of the unique index on {', '.join(fields)}"
                work.refuse(index, Reason.DUPLICATE_KEY, detail, DUPLICATE_KEY)
                left.remove(index)
        work.inserted += len(left)

    def _judged_by(self) -> tuple[Document | None, list[list[str]]]:
        """The collection's validator, and the fields of its unique indexes."""
        if self._judge is None:
            with translated("looking at the collection"):
                found = next(iter(self._data.list_collections(filter={"name": self._collection})), None)
                indexes = self._data[self._collection].index_information() if found else {}
            options = found.get("options", {}) if found else {}
            active = options.get("validationAction", "error") == "error" and options.get("validationLevel") != "off"
            plain = {"key", "v", "unique", "ns", "background"}
            unique = [
                [field for field, _ in index["key"]]
                for name, index in indexes.items()
                if name != "_id_" and index.get("unique") and set(index) <= plain
            ]
            self._judge = (options.get("validator") if active else None, unique)
        return self._judge

    def _valid(self, work: Work, made: list[Document], indexes: list[int], validator: Document) -> list[int]:
        """Those of these documents that the validator takes; the others are refused."""
        with translated("asking the validator of the collection"):
            failed = self._failed([made[index] for index in indexes], validator)
        refused = {index for index in indexes if failed and _identity(made[index]["_id"]) in failed}
        for index in refused:
            work.refuse(index, Reason.REFUSED, "Document failed validation", VALIDATION_FAILED)
        return [index for index in indexes if index not in refused]

    def _failed(self, documents: list[Document], validator: Document) -> set[bytes]:
        """The `_id`s of those of these documents that a validator does not take."""
        stages: list[Document] = [
            {"$documents": {"$literal": documents}},
            {"$match": {"$nor": [validator]}},
            {"$project": {"_id": 1}},
        ]
        try:
            return {_identity(found["_id"]) for found in self._data.aggregate(stages)}
        except (DocumentTooLarge, OperationFailure) as error:
            if isinstance(error, OperationFailure) and error.code in TRANSIENT_CODES:
                raise
            # Too large together, or too deep with what is around them; a server older than 5.1 takes none of them.
            half = len(documents) // 2
            return (
                self._failed(documents[:half], validator) | self._failed(documents[half:], validator) if half else set()
            )

    def _known(self, work: Work, made: list[Document], indexes: Sequence[int]) -> list[int]:
        """Those of these documents whose `_id` is in the collection already."""
        own_ids = set(work.documents.own_ids)
        asked = [index for index in indexes if not self._sole or index in own_ids]
        if not asked:
            return []
        with translated("looking for documents that are there already"):
            found = self._raw.find({"_id": {"$in": [made[index]["_id"] for index in asked]}}, {"_id": 1})
            there = {_identity(document["_id"]) for document in found}
        return [index for index in asked if _identity(made[index]["_id"]) in there]

    def _taken(self, made: list[Document], indexes: Sequence[int], fields: Sequence[str]) -> list[int]:
        """Those of these documents whose values of a unique index are another's."""
        keys = {index: [_value(made[index], field) for field in fields] for index in indexes}
        asked = [index for index, key in keys.items() if not any(isinstance(value, list) for value in key)]
        if not asked:
            return []
        queries = [dict(zip(fields, keys[index], strict=True)) for index in asked]
        with translated("looking for documents that are there already"):
            found = self._data[self._collection].find({"$or": queries}, {**dict.fromkeys(fields, 1), "_id": 0})
            there = {_identity([_value(document, field) for field in fields]) for document in found}
        taken = [index for index in asked if _identity(keys[index]) in there]
        claims = [(index, " ".join(fields), keys[index]) for index in asked if index not in taken]
        return taken + self._lost(made, claims)

    def _lost(self, made: list[Document], claims: Iterable[tuple[int, str, object]]) -> list[int]:
        """Those of these documents that claim a key which another line claimed before; the same document may come again."""
        wanted = [
            {"_id": {"job": self._job, "what": what, "key": _digest(key)}, "by": _digest(made[index]), "index": index}
            for index, what, key in claims
        ]
        if not wanted:
            return []
        with translated("claiming keys"):
            writes = [InsertOne({"_id": claim["_id"], "by": claim["by"]}) for claim in wanted]
            there = [wanted[fault["index"]] for fault in write_all(self._claims, writes)["writeErrors"]]
            ids = [claim["_id"] for claim in there]
            held = {bson.encode(found["_id"]): found["by"] for found in self._claims.find({"_id": {"$in": ids}})}
        return [claim["index"] for claim in there if held.get(bson.encode(claim["_id"])) != bytes(claim["by"])]

    def _refused(self, work: Work, index: int, document: Document) -> bool:
        line = work.documents.batch.line(work.documents.positions[index])
        try:
            size = len(encode(document))
        except (BSONError, OverflowError, RecursionError, UnicodeEncodeError) as error:
            work.refuse(index, *unencodable(error))
            return True
        if isinstance(document["_id"], list) or _has_operators(document["_id"]):
            work.refuse(index, Reason.BAD_ID, "an _id is no array, and has no keys that begin with $")
        elif line.count(b"{") + line.count(b"[") > DEPTH_MOST and _depth(document) > DEPTH_MOST:
            work.refuse(index, Reason.TOO_DEEP, f"the document is nested deeper than {DEPTH_MOST} levels")
        elif detail := too_large(size):
            work.refuse(index, Reason.TOO_LARGE, detail)
        else:
            return False
        return True


def _identity(value: object) -> bytes:
    return bson.encode({"": value})


def _digest(value: object) -> Binary:
    return Binary(hashlib.sha256(_identity(value)).digest())


def _value(document: Document, path: str) -> object:
    """What an index holds for a path; None where there is nothing. An array anywhere comes out as it is."""
    found: Any = document
    for name in path.split("."):
        if isinstance(found, list):
            return found
        found = found.get(name, _MISSING) if isinstance(found, dict) else _MISSING
    return None if found is _MISSING else found


def _has_operators(value: object) -> bool:
    """Whether an `_id` has a key that begins with $, at any depth."""
    if isinstance(value, list):
        return any(map(_has_operators, value))
    return isinstance(value, dict) and any(key.startswith("$") or _has_operators(item) for key, item in value.items())


def _depth(document: Document) -> int:
    deepest = 0
    level: list[tuple[Any, int]] = [(document, 1)]
    while level:
        item, depth = level.pop()
        deepest = max(deepest, depth)
        children = item.values() if isinstance(item, dict) else item
        level += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    return deepest
