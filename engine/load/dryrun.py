"""A load that writes nothing to its collection: every line is read, parsed and judged as a load would judge it.

What only an insert would reveal is found otherwise: the validator runs in an aggregation over documents that are sent with it,
and values that must be unique are claimed in the control database, so that lines which conflict are found whichever workers read
them. Not detected: conflicts on unique indexes over arrays or with options; what an index cannot hold (geometry that is none, an
array for a hashed one, two arrays for a compound one); an `_id` of more than 8 MiB. Reported although a load would take it: a
line whose rival is later rejected by another worker.
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
"""How deep the server takes a document to be nested (measured on 6.0; it documents 100)."""

VALIDATION_FAILED: Final = 121

MAX_QUERY_BYTES: Final = 8 * 1024 * 1024
"""Of the values in one query; the driver sends none over 16 MiB."""

_ID_IS_ARRAY: Final = 53
_ID_HAS_OPERATOR: Final = 52
_MISSING: Final = object()


_Keys = tuple[str, str, dict[int, object]]
"""What is claimed, why a line is refused that loses, and the key of each document that has one."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a collection asks of its documents: its validator, where one is in force, the collation that goes for it, and the
    fields of each unique index."""

    validator: Document | None
    collation: Document | None
    unique: list[list[str]]


class DryRun(Sink):
    """Judges the batches of a job where a Sink writes them.

    Args:
        job_id: under which keys are claimed; the other arguments are those of a Sink.
    """

    def __init__(self, store: Store, collection: str, plan: Plan, write_timeout_seconds: float, job_id: str) -> None:
        super().__init__(store, collection, plan, write_timeout_seconds)
        self._data = leniently(store.data)  # what is there is compared, and not calculated with
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
            why = f"another document has its values of the unique index on {', '.join(fields)}"
            keys.append((" ".join(fields), why, _values(made, fields)))
            standing = set(left)
            taken = self._taken({index: key for index, key in keys[-1][2].items() if index in standing}, fields)
            for index in taken:
                work.refuse(index, Reason.DUPLICATE_KEY, why, DUPLICATE_KEY)
            left = sorted(standing - set(taken))
        # Claimed is only by lines against which the collection has nothing.
        lost = self._fight(made, left, keys)
        for index, why in lost.items():
            work.refuse(index, Reason.DUPLICATE_KEY, why, DUPLICATE_KEY)
        work.inserted += len(left) - len(lost)

    def _fight(self, made: list[Document], indexes: Sequence[int], keys: Sequence[_Keys]) -> dict[int, str]:
        """Let documents claim their keys, one kind after the other; returns those that lost, and why.

        A document that loses one claim releases its others; one that lost only against a released claim tries again.
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
            with translated("looking at the collection"):
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
        """Those of these documents that the validator takes; the others are refused."""
        # It answers with an `_id`: of documents that have the same one, each is asked about apart from the others.
        rounds: list[dict[bytes, int]] = []
        for index in indexes:
            identity = _identity(made[index]["_id"])
            for asked in rounds:
                if asked.setdefault(identity, index) == index:
                    break
            else:
                rounds.append({identity: index})
        refused: set[int] = set()
        with translated("asking the validator of the collection"):
            for asked in rounds:
                failed = self._failed([made[i] for i in asked.values()], validator, collation)
                refused |= {asked[identity] for identity in failed}
        for index in sorted(refused):
            work.refuse(index, Reason.REFUSED, "Document failed validation", VALIDATION_FAILED)
        return [index for index in indexes if index not in refused]

    def _failed(self, documents: list[Document], validator: Document, collation: Document | None) -> set[bytes]:
        """The `_id`s of those of these documents that a validator does not take."""
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
            # Too large or too deep with what is around it here is fine by itself; on any other error a load would stumble, too.
            fine = code is None or code == TOO_DEEP_CODE or code in TOO_LARGE_CODES
            return set() if fine else {_identity(documents[0]["_id"])}

    def _known(self, work: Work, made: list[Document], indexes: Sequence[int]) -> list[int]:
        """Those of these documents whose `_id` is in the collection already."""
        own_ids = set(work.documents.own_ids)
        asked = [index for index in indexes if not self._sole or index in own_ids]
        if not asked:
            return []
        with translated("looking for documents that are there already"):
            here = self._data[self._collection]
            there = {
                _identity(_normal(document["_id"]))
                for some in _in_pieces([made[index]["_id"] for index in asked])
                for document in here.find({"_id": {"$in": some}}, {"_id": 1})
            }
        return [index for index in asked if _identity(_normal(made[index]["_id"])) in there]

    def _taken(self, keys: dict[int, object], fields: Sequence[str]) -> list[int]:
        """Those of these documents whose values of a unique index a document of the collection has."""
        if not keys:
            return []
        queries = [
            {field: {"$eq": value} for field, value in zip(fields, values, strict=True)}
            for values in keys.values()
            if isinstance(values, list)
        ]
        with translated("looking for documents that are there already"):
            # By whole fields: MongoDB takes no projection of both a path and a part of it.
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
        """Those of these documents that claim a key which another line claimed before; the same document may come again."""
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
                        wanted.append(claim)  # another worker has let go of it since
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
            work.refuse(index, Reason.BAD_ID, "an _id is no array", _ID_IS_ARRAY)
        elif _has_operators(document["_id"]):
            work.refuse(index, Reason.BAD_ID, "an _id has no keys that begin with $", _ID_HAS_OPERATOR)
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
    """These values, as many at a time as a query holds: as BSON they are larger by far than the lines that they stand in."""
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
    """A value as an index compares it: numbers of any type are one key where they are equal."""
    if isinstance(value, Decimal128):
        exact = value.to_decimal()
        return int(exact) if exact.is_finite() and exact == exact.to_integral_value() and abs(exact) < 2**63 else value
    if isinstance(value, float):
        return int(value) if value.is_integer() and -(2**63) <= value < 2**63 else value
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # what was read from the database knows that it was written as 64 bits
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    return [_normal(item) for item in value] if isinstance(value, list) else value


def _values(made: list[Document], fields: Sequence[str]) -> dict[int, object]:
    """What each of these documents has for the fields of a unique index; those with an array there are left out."""
    values = {index: [_value(document, field) for field in fields] for index, document in enumerate(made)}
    return {index: key for index, key in values.items() if not any(isinstance(value, list) for value in key)}


def _value(document: Document, path: str) -> object:
    """What an index holds for a path; None where there is nothing. An array anywhere comes out as it is."""
    found: Any = document
    for name in path.split("."):
        if isinstance(found, list):
            return found
        found = found.get(name, _MISSING) if isinstance(found, dict) else _MISSING
    return None if found is _MISSING else found


def _has_operators(value: object) -> bool:
    """Whether an `_id` has a key that begins with $, at any depth, but for those of a reference (DBRef)."""
    left = [value]  # and not by calls of itself: it may be nested deeper than these may be
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
    """How deep a document is nested, as the server counts: it does not look into what is empty."""
    deepest = 0
    level: list[tuple[Any, int]] = [(document, 1)]
    while level:
        item, depth = level.pop()
        deepest = max(deepest, depth)
        children = item.values() if isinstance(item, dict) else item
        level += [(child, depth + 1) for child in children if isinstance(child, dict | list) and child]
    return deepest
