"""A load that writes nothing to its collection: every line is read, parsed and judged as a load would judge it.

What only an insert would reveal is found by other means: the validator runs in an aggregation over documents sent with
the command, and values that must be unique are claimed in the control database, so that conflicting lines are found
whichever workers read them. Not detected: conflicts on unique indexes over arrays or with options such as `sparse`;
values that an index cannot hold (invalid geometry, an array in a hashed index, two arrays in a compound one); an `_id`
of more than 8 MiB. Reported although a load would accept it: a line whose rival is later rejected by another worker.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import bson
from bson import Binary, Decimal128
from bson.errors import BSONError
from pymongo import DeleteOne, InsertOne
from pymongo.errors import DocumentTooLarge, OperationFailure

from engine.control.store import (
    DUPLICATE_KEY,
    Document,
    Store,
    described,
    indexes_of,
    job_key,
    leniently,
    translate,
    translated,
    write_all,
)
from engine.errors import Permanent
from engine.load.sink import (
    TOO_DEEP_CODE,
    TOO_DEEP_DETAIL,
    TOO_LARGE_CODES,
    Sink,
    Work,
    encode,
    size_fault,
    unencodable,
)
from engine.model import Plan, Reason

__all__ = ["DryRun"]

MAX_DEPTH: Final = 180
"""Levels of nesting that the server accepts in a document (measured on 6.0; its manual says 100)."""

VALIDATION_FAILED: Final = 121

MAX_QUERY_BYTES: Final = 8 * 1024 * 1024
"""The most bytes of values in one query; the driver sends no query over 16 MiB."""

_ID_IS_ARRAY: Final = 53
_ID_HAS_OPERATOR: Final = 52
_MISSING: Final = object()


_Keys = tuple[str, str, dict[int, object]]
"""A kind of claim: its name, why a line that loses it is refused, and the keys of documents by index."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a collection demands of its documents: its validator, if one is in force, the collation that applies to it,
    and the fields of each unique index."""

    validator: Document | None
    collation: Document | None
    unique: list[list[str]]


class DryRun(Sink):
    """Judges the batches of a job where a `Sink` would write them.

    Args:
        job_id: the job in whose name keys are claimed; the other arguments are those of `Sink`.
    """

    def __init__(self, store: Store, collection: str, plan: Plan, write_timeout_seconds: float, job_id: str) -> None:
        super().__init__(store, collection, plan, write_timeout_seconds)
        self._data = leniently(store.data)  # stored values are only compared, which allows this
        self._job = job_key(job_id)
        self._claims = store.claims
        self._rules: _Rules | None = None  # read with the first batch

    def _insert(self, work: Work, at_a_time: int, between: Callable[[], None]) -> None:
        made = work.materialize()
        left = [index for index in range(len(made)) if not self._refused(work, index, made[index])]
        rules = self._rules_of_collection()
        if rules.validator:
            left = self._valid(work, made, left, rules.validator, rules.collation)
        known = self._known(work, made, left)
        if known:
            error = {"keyPattern": {"_id": 1}, "errmsg": "another document has this _id"}
            self._duplicates(work, [(index, error) for index in known])
            gone = set(known)
            left = [index for index in left if index not in gone]
        own_ids = set(work.documents.own_ids)
        keys: list[_Keys] = [
            ("_id", "another line of the file has this _id", {index: made[index]["_id"] for index in own_ids})
        ]
        for fields in rules.unique:
            why = f"another document has its values in the unique index on {', '.join(fields)}"
            keys.append((" ".join(fields), why, _values(made, fields)))
            standing = set(left)
            taken = self._taken({index: key for index, key in keys[-1][2].items() if index in standing}, fields)
            for index in taken:
                work.refuse(index, Reason.DUPLICATE_KEY, why, DUPLICATE_KEY)
            left = sorted(standing - set(taken))
        # Only lines that do not conflict with the collection make claims.
        lost = self._fight(made, left, keys)
        for index, why in lost.items():
            work.refuse(index, Reason.DUPLICATE_KEY, why, DUPLICATE_KEY)
        work.inserted += len(left) - len(lost)

    def _fight(self, made: list[Document], indexes: Sequence[int], keys: Sequence[_Keys]) -> dict[int, str]:
        """Claim the keys of documents, one kind after the other; returns the documents that lost, and why.

        A document that loses a claim releases those that it holds; one that lost to a claim released since tries again.
        """
        lost: dict[int, str] = {}
        while indexes:
            fell: dict[int, tuple[str, bytes]] = {}
            free: set[bytes] = set()
            for turn, (what, why, values) in enumerate(keys):
                standing = [index for index in indexes if index in values and index not in fell]
                releases: list[DeleteOne] = []
                for index in self._lost(made, [(index, what, values[index]) for index in standing]):
                    fell[index] = why, bson.encode(self._claim(what, values[index]))
                    held = [self._claim(of, had[index]) for of, _, had in keys[:turn] if index in had]
                    by = _digest(made[index])
                    releases += [DeleteOne({"_id": claim, "by": by}) for claim in held]
                    free |= set(map(bson.encode, held))
                if releases:
                    with translated("releasing claims"):
                        write_all(self._claims, releases)
            again = [index for index, (_, claim) in fell.items() if claim in free]
            again = [] if len(again) == len(indexes) else again
            lost |= {index: fell[index][0] for index in fell.keys() - set(again)}
            indexes = again
        return lost

    def _rules_of_collection(self) -> _Rules:
        if self._rules is None:
            with translated("checking the collection"):
                found = described(self._data, self._collection)
                indexes = indexes_of(self._data, self._collection) if found else []
            options = found.get("options", {}) if found else {}
            active = options.get("validationAction", "error") != "warn" and options.get("validationLevel") != "off"
            plain = {"name", "key", "v", "unique", "ns", "background"}
            unique = [
                list(index["key"])
                for index in indexes
                if index["name"] != "_id_" and index.get("unique")
                if {option for option, value in index.items() if value is not False} <= plain
            ]
            self._rules = _Rules(options.get("validator") if active else None, options.get("collation"), unique)
        return self._rules

    def _valid(
        self, work: Work, made: list[Document], indexes: list[int], validator: Document, collation: Document | None
    ) -> list[int]:
        """Indexes of the documents that the validator accepts; the others are refused."""
        # The server answers with `_id`s, so documents that share one are checked in separate rounds.
        rounds: list[dict[bytes, int]] = []
        for index in indexes:
            identity = _identity(made[index]["_id"])
            for asked in rounds:
                if asked.setdefault(identity, index) == index:
                    break
            else:
                rounds.append({identity: index})
        refused: set[int] = set()
        with translated("applying the collection's validator"):
            for asked in rounds:
                failed = self._failed([made[i] for i in asked.values()], validator, collation)
                refused |= {asked[identity] for identity in failed}
        for index in sorted(refused):
            work.refuse(index, Reason.REFUSED, "Document failed validation", VALIDATION_FAILED)
        return [index for index in indexes if index not in refused]

    def _failed(self, documents: list[Document], validator: Document, collation: Document | None) -> set[bytes]:
        """The `_id`s, as BSON, of the documents that a validator does not accept."""
        stages: list[Document] = [
            {"$documents": {"$literal": documents}},
            {"$match": {"$nor": [validator]}},
            {"$project": {"_id": 1}},
        ]
        try:
            return {_identity(found["_id"]) for found in self._data.aggregate(stages, collation=collation)}
        except (DocumentTooLarge, OperationFailure) as error:
            code = error.code if isinstance(error, OperationFailure) else None
            if isinstance(error, OperationFailure) and type(translate(error, "")) is not Permanent:
                raise
            if half := len(documents) // 2:
                parts = documents[:half], documents[half:]
                return set().union(*(self._failed(part, validator, collation) for part in parts))
            # Too large or too deep is due to this command's wrapping: alone, the document is fine. A load would hit any
            # other error, too.
            fine = code is None or code == TOO_DEEP_CODE or code in TOO_LARGE_CODES
            return set() if fine else {_identity(documents[0]["_id"])}

    def _known(self, work: Work, made: list[Document], indexes: Sequence[int]) -> list[int]:
        """Indexes of the documents whose `_id` is already in the collection."""
        own_ids = set(work.documents.own_ids)
        asked = [index for index in indexes if not self._sole or index in own_ids]
        if not asked:
            return []
        with translated("looking for existing documents"):
            here = self._data[self._collection]
            there = {
                _identity(_normal(document["_id"]))
                for some in _in_pieces([made[index]["_id"] for index in asked])
                for document in here.find({"_id": {"$in": some}}, {"_id": 1})
            }
        return [index for index in asked if _identity(_normal(made[index]["_id"])) in there]

    def _taken(self, keys: dict[int, object], fields: Sequence[str]) -> list[int]:
        """Indexes of the documents whose values for the fields of a unique index are already in the collection."""
        if not keys:
            return []
        queries = [
            {field: {"$eq": value} for field, value in zip(fields, values, strict=True)}
            for values in keys.values()
            if isinstance(values, list)
        ]
        with translated("looking for existing documents"):
            # Project top-level fields: MongoDB refuses a projection of both a path and a part of it.
            shown = {"_id": 0} | {field.partition(".")[0]: 1 for field in fields}
            there = {
                _identity(_normal([_value(document, field) for field in fields]))
                for some in _in_pieces(queries)
                for document in self._data[self._collection].find({"$or": some}, shown)
            }
        return [index for index, values in keys.items() if _identity(_normal(values)) in there]

    def _claim(self, what: str, key: object) -> Document:
        return {"job": self._job, "what": what, "key": _digest(_normal(key))}

    def _lost(self, made: list[Document], claims: Iterable[tuple[int, str, object]]) -> list[int]:
        """Indexes of the documents whose key another line has claimed; the same document may claim it again."""
        wanted = [
            {"_id": self._claim(what, key), "by": _digest(made[index]), "index": index} for index, what, key in claims
        ]
        if not wanted:
            return []
        lost: list[int] = []
        with translated("claiming keys"):
            while wanted:
                writes = [InsertOne({"_id": claim["_id"], "by": claim["by"]}) for claim in wanted]
                there = [wanted[fault["index"]] for fault in write_all(self._claims, writes)["writeErrors"]]
                ids = [claim["_id"] for claim in there]
                held = {bson.encode(found["_id"]): found["by"] for found in self._claims.find({"_id": {"$in": ids}})}
                wanted = []
                for claim in there:
                    by = held.get(bson.encode(claim["_id"]))
                    if by is None:
                        wanted.append(claim)  # another worker has released it since
                    elif by != bytes(claim["by"]):
                        lost.append(int(claim["index"]))
        return lost

    def _refused(self, work: Work, index: int, document: Document) -> bool:
        line = work.documents.batch.line(work.documents.positions[index])
        try:
            size = len(encode(document))
        except (BSONError, OverflowError, RecursionError, UnicodeEncodeError) as error:
            work.refuse(index, *unencodable(error))
            return True
        if isinstance(document["_id"], list):
            work.refuse(index, Reason.BAD_ID, "an _id cannot be an array", _ID_IS_ARRAY)
        elif _has_operators(document["_id"]):
            work.refuse(index, Reason.BAD_ID, "an _id cannot have keys that begin with $", _ID_HAS_OPERATOR)
        elif line.count(b"{") + line.count(b"[") > MAX_DEPTH and _depth(document) > MAX_DEPTH:
            work.refuse(index, Reason.TOO_DEEP, TOO_DEEP_DETAIL, TOO_DEEP_CODE)
        elif excess := size_fault(size):
            work.refuse(index, Reason.TOO_LARGE, excess)
        else:
            return False
        return True


def _identity(value: object) -> bytes:
    return bson.encode({"": value})


def _in_pieces(values: Iterable[Any]) -> Iterator[list[Any]]:
    """The values in pieces that each fit into a query: as BSON they may be far larger than the lines they come from."""
    piece: list[Any] = []
    size = 0
    for value in values:
        more = len(_identity(value))
        if piece and size + more > MAX_QUERY_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(value)
        size += more
    if piece:
        yield piece


def _digest(value: object) -> Binary:
    return Binary(hashlib.sha256(_identity(value)).digest())


def _normal(value: object) -> object:
    """A value as an index compares it: equal numbers of different types are the same key."""
    if isinstance(value, Decimal128):
        exact = value.to_decimal()
        return int(exact) if exact.is_finite() and exact == exact.to_integral_value() and abs(exact) < 2**63 else value
    if isinstance(value, float):
        return int(value) if value.is_integer() and -(2**63) <= value < 2**63 else value
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # an Int64 from the database would always be encoded as 64 bits
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list) else value


def _values(made: list[Document], fields: Sequence[str]) -> dict[int, object]:
    """Each document's values for the fields of a unique index; documents with an array there are left out."""
    values = {index: [_value(document, field) for field in fields] for index, document in enumerate(made)}
    return {index: key for index, key in values.items() if not any(isinstance(value, list) for value in key)}


def _value(document: Document, path: str) -> object:
    """The value that an index holds for a path; None if it is missing. An array on the path is returned as it is."""
    found: Any = document
    for name in path.split("."):
        if isinstance(found, list):
            return found
        found = found.get(name, _MISSING) if isinstance(found, dict) else _MISSING
    return None if found is _MISSING else found


def _has_operators(value: object) -> bool:
    """Whether an `_id` has a key that begins with $, at any depth, other than those of a reference (DBRef)."""
    left = [value]  # not recursive: the value may be nested deeper than Python's recursion limit
    while left:
        item = left.pop()
        if isinstance(item, dict):
            names = list(item)
            if names[:2] == ["$ref", "$id"] and isinstance(item["$ref"], str):
                names = names[3 if names[2:3] == ["$db"] and isinstance(item["$db"], str) else 2 :]
            if any(name.startswith("$") for name in names):
                return True
            left += item.values()
        elif isinstance(item, list):
            left += item
    return False


def _depth(document: Document) -> int:
    """The nesting depth of a document as the server counts it: empty objects and arrays add no level."""
    deepest = 0
    level: list[tuple[Any, int]] = [(document, 1)]
    while level:
        item, depth = level.pop()
        deepest = max(deepest, depth)
        children = item.values() if isinstance(item, dict) else item
        level += [(child, depth + 1) for child in children if isinstance(child, dict | list) and child]
    return deepest
