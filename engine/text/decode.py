"""Decodes each line into a document or a reject, with orjson. Pure: no I/O, and no bad line ever raises.

Within a job, a line's outcome depends only on its bytes and its offset, so that a replay gives the same documents.
"""

import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, repeat
from operator import is_
from threading import Lock
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from engine.model import Format, Reason, Reject
from engine.text.batches import Batch
from engine.text.encode import COMPILED, IDENTITY_BYTES, Encoded, Identity, Object, encode
from engine.text.integers import beyond_int64, has_wide_digits, may_have_wide_digits
from engine.text.lines import HEAD_BYTES, LONG_LINE_BYTES

__all__ = ["BOM", "LONG_PIECE_BYTES", "PIECE_BYTES", "Documents", "decode", "piece_bytes", "reject"]

BOM: Final = b"\xef\xbb\xbf"
BLANK: Final = " \t\n\r\x0b\x0c"

PIECE_BYTES: Final = 32 * 1024
"""About how many bytes of lines are parsed at a time: their documents are encoded and freed while they are still in the
CPU cache. With a whole batch at a time, every object would be fetched from memory three times."""

PIECE_LINES: Final = 8
"""A piece grows, to four times `PIECE_BYTES` at most, until it has about so many lines: what a piece costs, whatever is in it,
takes as long as 10 KiB of text."""

LARGE_BYTES: Final = 4 * 1024 * 1024
"""More than this is one long line, which is left to the driver: it encodes straight into the message, where the extension
would make another copy of megabytes. The line's digits are looked at before it is parsed, for the same reason."""

LONG_PIECE_BYTES: Final = 256 * 1024
"""A piece of more than this holds a long line. The objects of small values in it may take fifty times its length."""

# Held while a long piece is parsed and encoded by the extension, so that the objects of only one are in memory. Several
# threads would gain nothing: parsing and encoding need the interpreter.
_LONG_PIECES: Final = Lock()

# Separates the lines of a piece, which are parsed as the elements of one array by a single call. It is random in each
# process, so that no file can contain it on purpose.
_MARK: Final = secrets.randbits(62) | 1 << 61
_SEPARATOR: Final = b",%d," % _MARK

_Identities = NDArray[np.uint8]
"""The twelve bytes of each line's `_id`, as rows."""


class Documents:
    """The documents of a batch. Each pass over them parses the lines anew, lazily and a piece at a time.

    At the end of a pass, document `i` came from line `positions[i]` of the batch; `own_ids` has the indexes of
    documents that brought their own `_id`; `rejects` holds the lines that did not become documents, and `blank` counts
    those of white space only. `seconds` is the time spent on parsing so far, over all passes.
    """

    def __init__(self, batch: Batch, format: Format, tag: bytes, file_key: str) -> None:
        self.batch = batch
        self._format = format
        self._tag = tag
        self._file_key = file_key
        self._begun: Iterator[Encoded | Object] | None = None
        self._may_be_wide: bool | None = None  # None: not looked at yet
        self.positions: list[int] = []
        self.own_ids: list[int] = []
        self.rejects: list[Reject] = []
        self.blank = 0
        self.seconds = 0.0

    def any(self) -> bool:
        """Whether there is any document.

        A pass over `encoded()` does not repeat what this has done to find the first; any other begins anew.
        """
        if self._begun is None:
            parts = self._encoded()
            if (first := next(parts, None)) is not None:
                self._begun = chain(iter([first]), parts)  # a list would keep it until the end of the pass
        return self._begun is not None

    def __iter__(self) -> Iterator[Object]:
        self._begun = None  # what it has noted is noted anew
        for first, last, identities in self._pieces():
            documents, theirs = self._decode(first, last, identities, self._is_wide(first, last))
            self._identify(documents, theirs)
            yield from documents

    def encoded(self) -> Iterable[Encoded | Object]:
        """The documents for the driver: BSON already, a piece at a time, or for it to encode.

        Each iteration is a pass, since the driver may send a command again (to a server that is overloaded, or that
        wants new credentials).
        """
        return _Again(self._pass)

    def _pass(self) -> Iterator[Encoded | Object]:
        begun, self._begun = self._begun, None
        return self._encoded() if begun is None else begun

    def _encoded(self) -> Iterator[Encoded | Object]:
        for first, last, identities in self._pieces():
            long = int(self.batch.ends[last - 1]) - self.batch.start(first) > LONG_PIECE_BYTES
            with _LONG_PIECES if long else nullcontext():
                made = self._made(first, last, identities)
            if isinstance(made, Encoded):
                yield made
            else:
                yield from made
            del made  # not to be in memory beside the next one

    def _made(self, first: int, last: int, identities: _Identities) -> Encoded | list[Object]:
        """The documents of a piece: as BSON, or for the driver to encode."""
        if not COMPILED or len(self.batch.data) > LARGE_BYTES:
            documents, theirs = self._decode(first, last, identities, self._is_wide(first, last))
            self._identify(documents, theirs)
            return documents
        before = len(self.positions), len(self.rejects), self.blank
        documents, theirs = self._decode(first, last, identities, wide=False)
        # The extension sees each number, which costs less than to look at the digits in the lines.
        made = encode(documents, theirs, checked=False)
        if made is None:
            if self._is_wide(first, last):
                del documents, theirs  # a long line's need not be in memory twice
                del self.positions[before[0] :], self.rejects[before[1] :]
                self.blank = before[2]
                documents, theirs = self._decode(first, last, identities, wide=True)
            made = encode(documents, theirs, checked=True)
        if made is None:
            self._identify(documents, theirs)
            return documents
        encoded, own_ids = made
        self._note(own_ids, documents)
        return encoded if documents else []  # the driver would take a piece without any for an error

    def _identify(self, documents: list[Object], identities: bytes) -> None:
        """Give the documents of a piece that has just been parsed the `_id`s that they lack."""
        made = list(map(Identity, struct.iter_unpack(f"{IDENTITY_BYTES}s", identities)))
        ids = list(map(dict.setdefault, documents, repeat("_id"), made))
        if not all(map(is_, ids, made)):
            pairs = enumerate(zip(ids, made, strict=True))
            self._note([index for index, (id, identity) in pairs if id is not identity], documents)

    def _note(self, own_ids: list[int], documents: list[Object]) -> None:
        """Record which documents of a piece that has just been parsed brought their own `_id`."""
        first = len(self.positions) - len(documents)
        self.own_ids += [first + index for index in own_ids]

    def _pieces(self) -> Iterator[tuple[int, int, _Identities]]:
        """Begin a pass: the first and the last line (exclusive) of each piece, and the identities of all lines."""
        self.positions, self.own_ids, self.rejects, self.blank = [], [], [], 0
        batch = self.batch
        if batch.oversized is not None:
            detail = f"the line has {batch.oversized.length} bytes, more than ENGINE_MAX_LINE_BYTES allows"
            self.rejects.append(reject(batch, 0, Reason.TOO_LARGE, detail))
            return
        identities = _identities(batch, self._tag)
        size = piece_bytes(len(batch.data), batch.count)
        cuts = np.searchsorted(batch.ends, np.arange(size, len(batch.data), size))
        first = 0
        for last in dict.fromkeys([*cuts[cuts > 0].tolist(), batch.count]):
            yield first, last, identities
            first = last

    def _is_wide(self, first: int, last: int) -> bool:
        """Whether an integer on lines `first` to `last` (exclusive) may be outside int64; with few false alarms."""
        batch = self.batch
        if self._may_be_wide is None:
            self._may_be_wide = self._format is Format.NDJSON and may_have_wide_digits(batch.data)
        return self._may_be_wide and has_wide_digits(batch.data[batch.start(first) : int(batch.ends[last - 1])])

    def _decode(self, first: int, last: int, identities: _Identities, wide: bool) -> tuple[list[Object], bytes]:
        """The documents of lines `first` to `last` (exclusive), and twelve bytes for each: the `_id` if it brings none.

        Unless `wide`, an integer that 64 bits cannot hold becomes a float.
        """
        began = time.perf_counter()
        documents = self._ndjson(first, last, wide) if self._format is Format.NDJSON else self._text(first, last)
        if len(documents) == last - first:
            theirs = identities[first:last].tobytes()
        else:
            theirs = identities[self.positions[len(self.positions) - len(documents) :]].tobytes()
        self.seconds += time.perf_counter() - began
        return documents, theirs

    def _ndjson(self, first: int, last: int, wide: bool) -> list[Object]:
        data, start, ends = self.batch.data, self.batch.start(first), self.batch.ends[first:last].tolist()
        if wide or (documents := _objects(data, start, ends)) is None:
            return self._one_by_one(first, data[start : ends[-1]].split(b"\n"), wide)
        self.positions += range(first, last)
        return documents

    def _one_by_one(self, first: int, lines: list[bytes], wide: bool) -> list[Object]:
        """As `_ndjson`, but line by line, since some line is bad or blank or holds a long run of digits."""
        documents: list[Object] = []
        for position, line in enumerate(lines, first):
            body = line.removeprefix(BOM) if self.batch.offset == position == 0 else line
            try:
                document = orjson.loads(body)
            except orjson.JSONDecodeError as error:
                if not body.strip():
                    self.blank += 1
                else:
                    self._refuse(position, Reason.INVALID_JSON, _fault(body, error))
                continue
            if type(document) is not dict:
                self._refuse(position, Reason.NOT_AN_OBJECT, f"the line is {_KINDS[type(document)]}, not an object")
            elif wide and (literal := beyond_int64(body, document)):
                detail = f"the integer {literal} is outside the range of a signed 64-bit integer"
                self._refuse(position, Reason.INT_RANGE, detail)
            else:
                self.positions.append(position)
                documents.append(document)
        return documents

    def _text(self, first: int, last: int) -> list[Object]:
        """`content` and `originalFile` of each line."""
        documents: list[Object] = []
        batch = self.batch
        text = batch.data[batch.start(first) : int(batch.ends[last - 1])]
        if batch.offset == first == 0:
            text = text.removeprefix(BOM)
        # Without a newline after it, a carriage return is a part of the line.
        bare = None if batch.terminated else batch.count - 1
        for position, line in enumerate(_decoded(text), first):
            try:
                content = line if isinstance(line, str) else line.decode()
            except UnicodeDecodeError as error:
                self._refuse(position, Reason.INVALID_UTF8, _no_utf8(error))
                continue
            if content.endswith("\r") and position != bare:
                content = content[:-1]
            if not content.strip(BLANK):
                self.blank += 1
            else:
                documents.append({"content": content, "originalFile": self._file_key})
                self.positions.append(position)
        return documents

    def _refuse(self, position: int, reason: Reason, detail: str) -> None:
        self.rejects.append(reject(self.batch, position, reason, detail))


class _Again:
    """What can be iterated again and again."""

    def __init__(self, begin: Callable[[], Iterator[Encoded | Object]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Encoded | Object]:
        return self._begin()


def decode(batch: Batch, format: Format, tag: bytes, file_key: str) -> Documents:
    """The documents of a batch.

    Args:
        batch: the lines.
        format: NDJSON or TEXT.
        tag: the six bytes that begin each generated `_id`; the line's offset, 6 bytes big-endian, follows.
        file_key: stored with each line of text as `originalFile`.
    """
    return Documents(batch, format, tag, file_key)


def piece_bytes(size: int, lines: int) -> int:
    """About how many bytes of a batch of `size` bytes in so many lines are parsed at a time."""
    return max(PIECE_BYTES, min(PIECE_LINES * size // lines, 4 * PIECE_BYTES))


def reject(batch: Batch, position: int, reason: Reason, detail: str, code: int | None = None) -> Reject:
    """The reject of line `position` of `batch`."""
    if batch.oversized is not None:
        line, length, offset = batch.oversized.head, batch.oversized.length, batch.offset
    else:
        line = batch.line(position)
        offset = batch.offset + batch.start(position)
        length = len(line)
        # Without a newline after it, a carriage return is a part of the line.
        if line.endswith(b"\r") and (position < batch.count - 1 or batch.terminated):
            length -= 1
    head = line[: min(length, HEAD_BYTES)]
    return Reject(offset, length, batch.ordinal + position, reason, detail, head, code)


def _objects(data: bytes, start: int, ends: list[int]) -> list[Object] | None:
    """The objects of the lines that end at `ends`, the first from `start` on; None unless every line is an object."""
    try:
        if ends[-1] - start < LONG_LINE_BYTES * len(ends):
            values = _together(data[start : ends[-1]], len(ends))
        else:
            # With long lines, a single call for all of them saves less than the copies that it needs cost.
            view, begins = memoryview(data), [start, *(end + 1 for end in ends[:-1])]
            values = [orjson.loads(view[begin:end]) for begin, end in zip(begins, ends, strict=True)]
    except orjson.JSONDecodeError:
        return None
    return values if set(map(type, values)) == {dict} else None


def _together(text: bytes, count: int) -> list[Any]:
    """The values of `count` lines, parsed as one array with marks between them; [] unless each line is one JSON value.

    Lines that are JSON only together with a neighbour are detected: a value across a line break swallows the mark
    there, and no line can contain one to make up for it.

    Raises:
        orjson.JSONDecodeError: together, the lines are not a valid array.
    """
    found = orjson.loads(b"[%b]" % text.replace(b"\n", _SEPARATOR))
    whole = len(found) == 2 * count - 1 and found[1::2].count(_MARK) == count - 1
    return found[::2] if whole else []


def _fault(line: bytes, error: orjson.JSONDecodeError) -> str:
    """What is wrong with a line that is not JSON; the parser does not say where UTF-8 is invalid, so this does."""
    try:
        line.decode()
    except UnicodeDecodeError as fault:
        return _no_utf8(fault)
    return f"{error.msg}: column {error.colno} of the line"


def _no_utf8(error: UnicodeDecodeError) -> str:
    """Where a line is not UTF-8, and why."""
    return f"byte {error.start} of the line, 0x{error.object[error.start]:02x}: {error.reason}"


def _decoded(text: bytes) -> Sequence[str | bytes]:
    """The lines of a text, decoded; or all of them as bytes if any is not UTF-8."""
    try:
        return text.decode().split("\n")
    except UnicodeDecodeError:
        return text.split(b"\n")


def _identities(batch: Batch, tag: bytes) -> _Identities:
    count = batch.count
    offsets = np.empty(count, ">u8")
    offsets[0] = batch.offset
    offsets[1:] = batch.ends[:-1] + (batch.offset + 1)
    identities = np.empty((count, IDENTITY_BYTES), np.uint8)
    identities[:, :6] = np.frombuffer(tag, np.uint8)
    identities[:, 6:] = offsets.view(np.uint8).reshape(count, 8)[:, 2:]
    return identities


_KINDS: Final = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
