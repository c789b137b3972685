"""Unordered bulk writes, and the triage of what the server or the encoder refuses.

A document that cannot be stored never affects its neighbours: it becomes a reject, with the server's error code if
there is one. What is counted as inserted has been acknowledged at `w: majority`; any trouble with the connection or the
server raises instead.
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
from engine.text.encode import Encoded

__all__ = ["TOO_DEEP_CODE", "TOO_DEEP_DETAIL", "TOO_LARGE_CODES", "Sink", "Work", "encode", "size_fault", "unencodable"]

MAX_DOCUMENT_BYTES: Final = 16 * 1024 * 1024
"""The largest document that the server accepts, `_id` included."""

MAX_COMMAND_BYTES: Final = 12 * 1024 * 1024
"""Bytes of documents in one insert command when they have to be split by size."""

TOO_DEEP_CODE: Final = 15
"""The server's code for a document that is nested too deeply."""

TOO_DEEP_DETAIL: Final = "the document is nested deeper than MongoDB allows"

TOO_LARGE_CODES: Final = frozenset({10334, 17280, 17419, 17420})
"""The server's codes for a document that is too large, or has a key too large for an index."""

_NO_COLLECTION: Final = frozenset({73, 166})
"""The server's codes, repeated for each document, for an invalid collection name and for a view."""

_BAD_ID: Final = frozenset({52, 53})
_BAD_VALUE: Final = 2
# Codes with which the server fails a whole command although only one document in it is at fault.
_OF_ONE_DOCUMENT: Final = frozenset({_BAD_VALUE, TOO_DEEP_CODE, 22}) | TOO_LARGE_CODES | _BAD_ID

_REFUSALS: Final = (DocumentTooLarge, OperationFailure, BSONError, OverflowError, RecursionError, UnicodeEncodeError)

# Replies are decoded leniently: errors quote long values cut at any byte, even within a character, and those of the
# validator may contain dates that Python cannot represent.
_REPLIES: Final[CodecOptions[Document]] = CodecOptions(
    tz_aware=True, unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO
)

# Documents stored by others may contain dates that Python cannot represent, and strings that are not UTF-8. Only their
# `_id` is decoded; apart from that their bytes are compared.
_STORED: Final = DEFAULT_RAW_BSON_OPTIONS.with_options(
    datetime_conversion=DatetimeConversion.DATETIME_MS, unicode_decode_error_handler="replace"
)


@dataclass(slots=True)
class Work:
    """A batch that is being written, and what became of its documents so far."""

    documents: Documents
    inserted: int = 0
    replayed: int = 0
    rejects: list[Reject] = field(default_factory=list)

    def materialize(self) -> list[Document]:
        """All documents, parsed again; for the few batches in which one of them has to be examined."""
        return list(self.documents)

    def refuse(self, index: int, reason: Reason, detail: str, code: int | None = None) -> None:
        """Record document `index` as a reject."""
        self.rejects.append(reject(self.documents.batch, self.documents.positions[index], reason, detail, code))


class Sink:
    """Writes the batches of one job into its collection.

    Args:
        store: the databases.
        collection: the name of the one that takes the documents.
        plan: determines whether a replayed `_id` counts as inserted or as a duplicate.
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
        """Write the documents of a batch; returns its tally and all its rejects, which the caller has to write.

        Args:
            documents: those of the batch.
            at_a_time: documents in one command; None: all of them. Fewer are for a retry: a server whose reply would be
                too large, since it quotes each document, closes the connection without an error.
            between: called before each command if there are several; what it raises ends the writing.

        Raises:
            Transient: not all of it is acknowledged; write the batch again, with fewer at a time if it is Severed.
            Permanent: the server will never accept this, whatever the documents are.
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
        """Insert all documents of a batch, `at_a_time` in one command."""
        if at_a_time < work.documents.batch.count:
            made = work.materialize()
            for first in range(0, len(made), at_a_time):
                between()
                self._insert_some(work, made, range(first, min(first + at_a_time, len(made))))
            return
        try:
            reply = self._command(work.documents.encoded())
        except _REFUSALS as error:
            made = work.materialize()
            self._triage(work, made, range(len(made)), error)
        else:
            self._account(work, range(len(work.documents.positions)), reply)

    def _insert_some(self, work: Work, made: list[Document], indexes: Sequence[int]) -> None:
        """Insert some documents of a batch; if the command is refused, find which of them are at fault."""
        try:
            reply = self._command([made[index] for index in indexes])
        except _REFUSALS as error:
            self._triage(work, made, indexes, error)
        else:
            self._account(work, indexes, reply)

    def _command(self, documents: Iterable[Document | Encoded]) -> Document:
        """Insert; returns the reply. Raises one of `_REFUSALS` if a document may be at fault, else as `write` does."""
        try:
            # A raw command, since insert_many examines each document in Python, which costs more than encoding it. The
            # documents are an iterable that the driver consumes while it encodes, so that only a few exist at a time.
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
            # Subclasses of AutoReconnect mean a timeout, or a server that is not the primary.
            raise (Severed(str(failure)) if type(error) is AutoReconnect else failure) from error

    def _account(self, work: Work, indexes: Sequence[int], reply: Document) -> None:
        failed = reply.get("writeErrors", ())
        if concern := reply.get("writeConcernError"):
            raise Transient(
                f"a majority did not confirm a write to collection {self._collection} in time (code {concern.get('code')}): "
                "make sure enough members of the replica set are up"
            )
        duplicates: list[tuple[int, Document]] = []
        for error in failed:
            index = indexes[error["index"]]
            if error["code"] == DUPLICATE_KEY:
                duplicates.append((index, error))
            elif error["code"] in _NO_COLLECTION:
                raise Refused(
                    f"collection {self._collection} no longer takes documents: {str(error.get('errmsg', ''))[:500]}; "
                    "use another one in a new job"
                )
            elif error["code"] in TRANSIENT_CODES:
                raise Transient(f"MongoDB could not store a document (code {error['code']}): check its members")
            else:
                reason, detail = _verdict(error["code"], str(error.get("errmsg", "")), error.get("errInfo"))
                work.refuse(index, reason, detail, error["code"])
        inserted = len(indexes) - len(failed)
        if reply["n"] != inserted:
            raise Transient(f"MongoDB counted {reply['n']} documents, but {inserted} were expected: see its log")
        work.inserted += inserted
        if duplicates:
            self._duplicates(work, duplicates)

    def _duplicates(self, work: Work, duplicates: list[tuple[int, Document]]) -> None:
        own = set(work.documents.own_ids)
        unclear: list[tuple[int, Document]] = []
        for index, error in duplicates:
            # A generated `_id` belongs to this very line: its document is already stored, even if changed since.
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
            # One at a time: stored documents may be far larger than the lines.
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
            # Nothing seems wrong with any of them: let the server tell which half is at fault.
            half = len(good) // 2
            parts = [good[:half], good[half:]]
        for part in parts:
            self._insert_some(work, made, part)


def size_fault(size: int) -> str | None:
    """Why MongoDB refuses a document of `size` bytes of BSON; None if it accepts it."""
    return (
        f"the document has {size} bytes as BSON; MongoDB takes at most {MAX_DOCUMENT_BYTES}"
        if size > MAX_DOCUMENT_BYTES
        else None
    )


def _forget_frames(error: BaseException | None) -> None:
    """Clear the frames of an error: the driver leaves cycles in them, which would keep the whole batch in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__


def _part(indexes: list[int], sizes: list[int]) -> list[list[int]]:
    """Split documents into consecutive groups that each fit into one command."""
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
        return Reason.TOO_LARGE, f"the document exceeds the {MAX_DOCUMENT_BYTES} bytes of BSON that MongoDB takes"
    if "NUL" in str(error).upper():
        return Reason.BAD_KEY, "a key contains the character NUL"
    return Reason.REFUSED, f"the document cannot be written as BSON: {str(error)[:500]}"


def _message(error: Exception) -> str:
    """The server's error message, without the full reply that the driver adds to it."""
    details = error.details if isinstance(error, OperationFailure) else None
    return str((details or {}).get("errmsg") or error)


def _verdict(code: int, message: str, info: Document | None) -> tuple[Reason, str]:
    """Reason and detail of a document that the server refuses with `code`."""
    detail = message[:1000]
    if code == TOO_DEEP_CODE:
        return Reason.TOO_DEEP, TOO_DEEP_DETAIL  # the server's own text is a path of a thousand characters
    if code in TOO_LARGE_CODES or (code == _BAD_VALUE and "too large" in message):
        return Reason.TOO_LARGE, detail
    if code in _BAD_ID or (code == _BAD_VALUE and "_id" in message):
        return Reason.BAD_ID, detail
    if info:
        detail = f"{detail}: {json_util.dumps(info, json_options=json_util.RELAXED_JSON_OPTIONS)}"[:1000]
    return Reason.REFUSED, detail
