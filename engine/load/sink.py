"""Unordered bulk writes, and the triage of what the server or the encoder refuses.

One document that cannot be stored never costs its neighbours: it becomes a reject with the server's code. What is
returned has been acknowledged at `w: majority`. Anything wrong with the connection or the server raises instead.
"""

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

import bson
from bson import json_util
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError, InvalidBSON
from bson.raw_bson import DEFAULT_RAW_BSON_OPTIONS, RawBSONDocument
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import AutoReconnect, DocumentTooLarge, OperationFailure, PyMongoError

from engine.control.store import DUPLICATE_KEY, TRANSIENT_CODES, Document, Store, translate, translated
from engine.errors import Refused, Severed, Transient
from engine.model import Plan, Reason, Reject, Tally
from engine.text.decode import Documents, reject

__all__ = ["TOO_DEEP_CODE", "TOO_DEEP_DETAIL", "TOO_LARGE_CODES", "Sink", "Work", "encode", "size_fault", "unencodable"]

MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024
"""What the server takes as one document, `_id` included."""

MAX_COMMAND_BYTES: Final = 12 * 1024 * 1024
"""How much one insert command carries when documents have to be parted by size."""

TOO_DEEP_CODE: Final = 15
"""The code with which the server answers a document that is nested too deep."""

TOO_DEEP_DETAIL: Final = "the document is nested deeper than MongoDB takes"

TOO_LARGE_CODES: Final = frozenset({10334, 17280, 17419, 17420})
"""The codes for one that is too large, or has a key too large for an index."""

_NO_COLLECTION: Final = frozenset({73, 166})
"""The codes, for each document, of a name that no collection can have, and of a view."""

_BAD_ID: Final = frozenset({52, 53})
_BAD_VALUE: Final = 2
# With these codes the server fails a whole command, although one document in it is at fault.
_OF_ONE_DOCUMENT: Final = frozenset({_BAD_VALUE, TOO_DEEP_CODE, 22}) | TOO_LARGE_CODES | _BAD_ID

_REFUSALS: Final = (DocumentTooLarge, OperationFailure, BSONError, OverflowError, RecursionError, UnicodeEncodeError)

# An error quotes long values cut at any byte, even within a character, and the validator with dates that Python cannot represent:
# it is decoded leniently.
_REPLIES: Final[CodecOptions[Document]] = CodecOptions(
    tz_aware=True, unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO
)

# What others have stored may hold dates that Python has not, and strings that are no UTF-8. Of these documents only the `_id`
# is read, and their bytes are compared.
_STORED: Final = DEFAULT_RAW_BSON_OPTIONS.with_options(
    datetime_conversion=DatetimeConversion.DATETIME_MS, unicode_decode_error_handler="replace"
)


@dataclass(slots=True)
class Work:
    """A batch on its way in: what became of its documents so far."""

    documents: Documents
    inserted: int = 0
    replayed: int = 0
    rejects: list[Reject] = field(default_factory=list)

    def materialize(self) -> list[Document]:
        """The documents, made anew; for the few batches in which one of them has to be looked at."""
        return list(self.documents)

    def refuse(self, index: int, reason: Reason, detail: str, code: int | None = None) -> None:
        """Document `index` is a reject."""
        self.rejects.append(reject(self.documents.batch, self.documents.positions[index], reason, detail, code))


class Sink:
    """Writes the batches of one job into its collection.

    Args:
        store: the databases.
        collection: takes the documents.
        plan: tells whether a replayed `_id` counts as inserted or as a duplicate.
        write_timeout_seconds: how long the server may wait for a majority.
    """

    def __init__(self, store: Store, collection: str, plan: Plan, write_timeout_seconds: float) -> None:
        self._data = store.data
        self._collection = collection
        raw = cast("Database[RawBSONDocument]", store.data.with_options(_STORED))
        self._raw: Collection[RawBSONDocument] = raw[collection]
        self._sole = plan.sole
        self._concern = {"w": "majority", "wtimeout": int(write_timeout_seconds * 1000)}

    def write(
        self, documents: Documents, at_a_time: int | None = None, between: Callable[[], None] = lambda: None
    ) -> tuple[Tally, list[Reject]]:
        """Write the documents of a batch; returns its tally and all its rejects, which are not written yet.

        Args:
            documents: of the batch.
            at_a_time: how many go into one command; None: all of them. Fewer are for another try: a server whose answer would
                be too large, since it quotes each document, closes the connection without a word.
            between: called before each of these commands; what it raises ends the writing.

        Raises:
            Transient: nothing or only a part is acknowledged; write the batch again, where it is Severed with fewer at a time.
            Permanent: the server will never take this, whatever the documents are.
        """
        work = Work(documents)
        if documents.any():
            self._insert(work, at_a_time or documents.batch.count, between)
        work.rejects += documents.rejects
        work.rejects.sort(key=lambda r: r.offset)
        batch = documents.batch
        tally = Tally(
            lines=batch.count,
            inserted=work.inserted + (work.replayed if self._sole else 0),
            duplicates=0 if self._sole else work.replayed,
            rejected=len(work.rejects),
            blank=documents.blank,
            bytes=batch.end - batch.offset,
        )
        return tally, work.rejects

    def _insert(self, work: Work, at_a_time: int, between: Callable[[], None]) -> None:
        """Insert all documents of a batch, so many in one command."""
        if at_a_time < work.documents.batch.count:
            made = work.materialize()
            for first in range(0, len(made), at_a_time):
                between()
                self._insert_some(work, made, range(first, min(first + at_a_time, len(made))))
            return
        try:
            reply = self._command(work.documents)
        except _REFUSALS as error:
            made = work.materialize()
            self._triage(work, made, range(len(made)), error)
        else:
            self._account(work, range(len(work.documents.positions)), reply)

    def _insert_some(self, work: Work, made: list[Document], indexes: Sequence[int]) -> None:
        """Insert some documents of a batch, and find which of them are at fault when they are refused."""
        try:
            reply = self._command([made[index] for index in indexes])
        except _REFUSALS as error:
            self._triage(work, made, indexes, error)
        else:
            self._account(work, indexes, reply)

    def _command(self, documents: Iterable[Document]) -> Document:
        """The reply to an insert. Raises one of `_REFUSALS` where a document may be at fault, and what `write` tells."""
        try:
            # The command itself, since insert_many looks at each document in Python, which costs more than encoding it. And
            # the documents as an iterable, which the driver walks through while it encodes: no more than a few of them are
            # ever there at a time.
            return self._data.command(
                {
                    "insert": self._collection,
                    "ordered": False,
                    "writeConcern": self._concern,
                    "documents": documents,
                },
                codec_options=_REPLIES,
            )
        except InvalidBSON as error:
            _forget_frames(error)
            raise Transient(f"MongoDB's answer to a write to collection {self._collection} cannot be read") from error
        except DocumentTooLarge:
            raise
        except OperationFailure as error:
            if error.code in _OF_ONE_DOCUMENT:
                raise
            _forget_frames(error)
            raise translate(error, f"writing to collection {self._collection}") from error
        except PyMongoError as error:
            _forget_frames(error)
            failure = translate(error, f"writing to collection {self._collection}")
            # Its subclasses tell of a time that ran out, or of a primary that is none.
            raise (Severed(str(failure)) if type(error) is AutoReconnect else failure) from error

    def _account(self, work: Work, indexes: Sequence[int], reply: Document) -> None:
        failed = reply.get("writeErrors", ())
        if concern := reply.get("writeConcernError"):
            raise Transient(
                f"a majority did not confirm a write to collection {self._collection} in time (code {concern.get('code')}): "
                "see that enough members of the replica set are up"
            )
        duplicates: list[tuple[int, Document]] = []
        for error in failed:
            index = indexes[error["index"]]
            if error["code"] == DUPLICATE_KEY:
                duplicates.append((index, error))
            elif error["code"] in _NO_COLLECTION:
                raise Refused(
                    f"collection {self._collection} takes no documents any more: {str(error.get('errmsg', ''))[:500]}; name "
                    "another one in a new job"
                )
            elif error["code"] in TRANSIENT_CODES:
                raise Transient(f"MongoDB could not store a document (code {error['code']}): check its members")
            else:
                reason, detail = _verdict(error["code"], str(error.get("errmsg", "")), error.get("errInfo"))
                work.refuse(index, reason, detail, error["code"])
        inserted = len(indexes) - len(failed)
        if reply["n"] != inserted:
            raise Transient(f"MongoDB counted {reply['n']} documents where {inserted} were expected: see its log")
        work.inserted += inserted
        if duplicates:
            self._duplicates(work, duplicates)

    def _duplicates(self, work: Work, duplicates: list[tuple[int, Document]]) -> None:
        own = set(work.documents.own_ids)
        unclear: list[tuple[int, Document]] = []
        for index, error in duplicates:
            # A generated `_id` is that of this very line: it is there already, whoever changed it since.
            if index not in own and list(error.get("keyPattern", ())) == ["_id"]:
                work.replayed += 1
            else:
                unclear.append((index, error))
        if not unclear:
            return
        made = work.materialize()
        by_id: dict[bytes, list[int]] = {}
        for index, _ in unclear:
            by_id.setdefault(_key(made[index]["_id"]), []).append(index)
        same: set[int] = set()
        with translated("reading documents back"):
            # One after the other: what is stored may be larger by far than the lines.
            for found in self._raw.find({"_id": {"$in": [made[index]["_id"] for index, _ in unclear]}}):
                indexes = by_id.get(_key(found["_id"]), ())
                same.update(index for index in indexes if index not in own or found.raw == encode(made[index]))
        for index, error in unclear:
            if index in same:
                work.replayed += 1
            else:
                work.refuse(index, Reason.DUPLICATE_KEY, str(error.get("errmsg", ""))[:1000], DUPLICATE_KEY)

    def _triage(self, work: Work, made: list[Document], indexes: Sequence[int], error: Exception) -> None:
        """Find which documents of a refused command are at fault, and write the others."""
        _forget_frames(error)
        if len(indexes) == 1:
            code = error.code if isinstance(error, OperationFailure) else None
            reason, detail = unencodable(error) if code is None else _verdict(code, _message(error), None)
            work.refuse(indexes[0], reason, detail, code)
            return
        good: list[int] = []
        sizes: list[int] = []
        for index in indexes:
            try:
                size = len(encode(made[index]))
            except (BSONError, OverflowError, RecursionError, UnicodeEncodeError) as fault:
                work.refuse(index, *unencodable(fault))
                continue
            if excess := size_fault(size):
                work.refuse(index, Reason.TOO_LARGE, excess)
                continue
            good.append(index)
            sizes.append(size)
        parts = _part(good, sizes)
        if len(good) == len(indexes) and len(parts) == 1:
            # Nothing is wrong with any of them that can be seen from here: the server says of which half it is true.
            half = len(good) // 2
            parts = [good[:half], good[half:]]
        for part in parts:
            self._insert_some(work, made, part)


def size_fault(size: int) -> str | None:
    """Why MongoDB takes no document of so many bytes of BSON; None where it does."""
    return (
        f"the document has {size} bytes as BSON; MongoDB takes at most {MAX_DOCUMENT_BYTES}"
        if size > MAX_DOCUMENT_BYTES
        else None
    )


def _forget_frames(error: BaseException | None) -> None:
    """Forget what the frames of an error hold: the driver leaves cycles there, and with them the whole batch in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__


def _part(indexes: list[int], sizes: list[int]) -> list[list[int]]:
    """Runs of documents that each fit into one command."""
    parts: list[list[int]] = []
    room = 0
    for index, size in zip(indexes, sizes, strict=True):
        if not parts or size > room:
            parts.append([])
            room = MAX_COMMAND_BYTES
        parts[-1].append(index)
        room -= size
    return parts


def encode(document: Document) -> bytes:
    """The document as the server stores it, `_id` first."""
    return bson.encode({"_id": document["_id"], **document})


def _key(value: object) -> bytes:
    if isinstance(value, RawBSONDocument):
        return bson.encode({"": bson.decode(value.raw)})
    return bson.encode({"": value})


def unencodable(error: Exception) -> tuple[Reason, str]:
    """Reason and detail of a document that cannot become BSON."""
    if isinstance(error, OverflowError):
        return Reason.INT_RANGE, "an integer is outside the range of a signed 64-bit integer"
    if isinstance(error, RecursionError):
        return Reason.TOO_DEEP, "the document is nested too deeply to be encoded as BSON"
    if isinstance(error, DocumentTooLarge):
        return Reason.TOO_LARGE, f"the document has more than the {MAX_DOCUMENT_BYTES} bytes that MongoDB takes as BSON"
    if "NUL" in str(error).upper():
        return Reason.BAD_KEY, "a key contains the character NUL"
    return Reason.REFUSED, f"the document cannot be written as BSON: {str(error)[:500]}"


def _message(error: Exception) -> str:
    """What the server says, without the rest of its answer, which the driver repeats."""
    details = error.details if isinstance(error, OperationFailure) else None
    return str((details or {}).get("errmsg") or error)


def _verdict(code: int, message: str, info: Document | None) -> tuple[Reason, str]:
    """Reason and detail of a document that the server refuses with `code`."""
    detail = message[:1000]
    if code == TOO_DEEP_CODE:
        return Reason.TOO_DEEP, TOO_DEEP_DETAIL  # the server's own is a path of a thousand characters
    if code in TOO_LARGE_CODES or (code == _BAD_VALUE and "too large" in message):
        return Reason.TOO_LARGE, detail
    if code in _BAD_ID or (code == _BAD_VALUE and "_id" in message):
        return Reason.BAD_ID, detail
    if info:
        detail = f"{detail}: {json_util.dumps(info, json_options=json_util.RELAXED_JSON_OPTIONS)}"[:1000]
    return Reason.REFUSED, detail
