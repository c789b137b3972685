"""Decodes each line into a document or a reject, with orjson. Pure: no I/O, and no bad line ever raises.

Within a job, a line's outcome depends only on its bytes and its offset, so that a replay gives the same documents.
"""

import re
import secrets
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any, Final

import numpy as np
import orjson

from engine.model import Format, Reason, Reject
from engine.text.batches import Batch
from engine.text.lines import HEAD_BYTES, LONG_LINE_BYTES

__all__ = ["BOM", "Documents", "Identity", "decode", "reject"]

BOM: Final = b"\xef\xbb\xbf"
BLANK: Final = " \t\n\r\x0b\x0c"

PIECE_BYTES: Final = 32 * 1024
"""About how many bytes of lines are parsed at a time: their documents are encoded and freed while they are still in the
CPU cache. With a whole batch at a time, every object would be fetched from memory three times."""

SPARSE_BYTES: Final = 4096
"""Possible places of a long run of digits are checked one by one if there is at most one per this many bytes; otherwise
a scan of all bytes is as fast."""

# Separates the lines of a piece, which are parsed as the elements of one array by a single call. It is random in each
# process, so that no file can contain it on purpose.
_MARK: Final = secrets.randbits(62) | 1 << 61
_SEPARATOR: Final = b",%d," % _MARK

# orjson silently turns an integer beyond 64 bits into a float, so integers outside int64 are searched for in the bytes,
# in up to three passes, each slower and more exact than the one before: `_may_have_wide_digits` over a batch,
# `_has_wide_digits` over a piece of it, `_beyond_int64` over one line.
# The smallest integer outside int64 has 19 digits. With each digit replaced by '0', one `find` locates a run of 19.
_ZEROS: Final = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))
_RUN: Final = b"0" * 19
_DIGIT_RUN: Final = re.compile(rb"0++")
_INT64_MAX_LITERAL: Final = b"%d" % (2**63 - 1)
_INT64_MIN_LITERAL: Final = b"%d" % 2**63

# Strings are matched first, so that digits within them are skipped; then numbers in full, to tell if they are integers.
_TOKEN: Final = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"|(-?\d{19,}+)((?:\.\d+)?(?:[eE][+-]?\d+)?)|\d++(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL
)
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_DIGITS: Final = b"0123456789"

# A literal of this many digits is certainly not an int64. It is not passed to int(), which refuses thousands of digits.
_CERTAINLY_WIDE: Final = 40

_Object = dict[str, Any]
"""A JSON object, and the document that it becomes."""


class Identity(tuple[bytes]):
    """A generated `_id`: a tuple that holds its twelve bytes, encoded as an ObjectId without running Python code.

    PyMongo's encoder recognizes types of BSON by their `_type_marker`: 7 is an ObjectId, with its bytes in `binary`.
    """

    __slots__ = ()
    _type_marker = 7
    binary = property(itemgetter(0))


class Documents:
    """The documents of a batch. Each pass over them parses the lines anew, lazily and a piece at a time.

    At the end of a pass, document `i` came from line `positions[i]` of the batch; `own_ids` has the indexes of
    documents that brought their own `_id`; `rejects` holds the lines that did not become documents, and `blank` counts
    those of white space only. `seconds` is the time spent on parsing so far, over all passes.

    What `any` has parsed is not parsed again by the pass that follows.
    """

    def __init__(self, batch: Batch, format: Format, tag: bytes, file_key: str) -> None:
        self.batch = batch
        self._format = format
        self._tag = tag
        self._file_key = file_key
        self._begun: Iterator[list[_Object]] | None = None
        self.positions: list[int] = []
        self.own_ids: list[int] = []
        self.rejects: list[Reject] = []
        self.blank = 0
        self.seconds = 0.0

    def any(self) -> bool:
        """Whether there is any document; parses up to the first of them."""
        if self._begun is None:
            pieces = self._pieces()
            if (first := next(filter(None, pieces), None)) is not None:
                self._begun = chain([first], pieces)
        return self._begun is not None

    def __iter__(self) -> Iterator[_Object]:
        begun, self._begun = self._begun, None
        return chain.from_iterable(self._pieces() if begun is None else begun)

    def _pieces(self) -> Iterator[list[_Object]]:
        self.positions, self.own_ids, self.rejects, self.blank = [], [], [], 0
        batch = self.batch
        if batch.oversized is not None:
            detail = f"the line has {batch.oversized.length} bytes, more than ENGINE_MAX_LINE_BYTES allows"
            self.rejects.append(reject(batch, 0, Reason.TOO_LARGE, detail))
            return
        began = time.perf_counter()
        identities = _identities(batch, self._tag)
        if self._format is Format.TEXT:
            decode_piece = self._text
        else:
            decode_piece = partial(self._ndjson, wide=_may_have_wide_digits(batch.data))
        cuts = np.searchsorted(batch.ends, np.arange(PIECE_BYTES, len(batch.data), PIECE_BYTES))
        first = 0
        for last in [*np.unique(cuts[cuts > 0]).tolist(), batch.count]:
            documents = decode_piece(first, last, identities[first:last])
            self.seconds += time.perf_counter() - began
            yield documents
            began = time.perf_counter()
            first = last

    def _ndjson(self, first: int, last: int, identities: Iterable[bytes], wide: bool) -> list[_Object]:
        """The documents of lines `first` to `last` (exclusive)."""
        data, start, ends = self.batch.data, self.batch.start(first), self.batch.ends[first:last].tolist()
        if wide:
            wide = _has_wide_digits(data[start : ends[-1]])
        if wide or (documents := _objects(data, start, ends)) is None:
            return self._one_by_one(first, data[start : ends[-1]].split(b"\n"), identities, wide)
        made = list(map(Identity, zip(identities)))
        ids = list(map(dict.setdefault, documents, repeat("_id"), made))
        if not all(map(is_, ids, made)):
            own = (index for index, (id, identity) in enumerate(zip(ids, made, strict=True)) if id is not identity)
            self.own_ids += [len(self.positions) + index for index in own]
        self.positions += range(first, last)
        return documents

    def _one_by_one(self, first: int, lines: list[bytes], identities: Iterable[bytes], wide: bool) -> list[_Object]:
        """As `_ndjson`, but line by line, since some line is bad or blank or holds a long run of digits."""
        documents: list[_Object] = []
        for position, (line, identity) in enumerate(zip(lines, identities, strict=True), first):
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
            elif wide and (literal := _beyond_int64(body)):
                detail = f"the integer {literal} is outside the range of a signed 64-bit integer"
                self._refuse(position, Reason.INT_RANGE, detail)
            else:
                if "_id" in document:
                    self.own_ids.append(len(self.positions))
                else:
                    document["_id"] = Identity((identity,))
                self.positions.append(position)
                documents.append(document)
        return documents

    def _text(self, first: int, last: int, identities: Iterable[bytes]) -> list[_Object]:
        """The documents of lines `first` to `last` (exclusive): `content` and `originalFile`."""
        documents: list[_Object] = []
        batch = self.batch
        text = batch.data[batch.start(first) : int(batch.ends[last - 1])]
        if batch.offset == first == 0:
            text = text.removeprefix(BOM)
        # Without a newline after it, a carriage return is a part of the line.
        bare = None if batch.terminated else batch.count - 1
        for position, (line, identity) in enumerate(zip(_decoded(text), identities, strict=True), first):
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
                documents.append({"_id": Identity((identity,)), "content": content, "originalFile": self._file_key})
                self.positions.append(position)
        return documents

    def _refuse(self, position: int, reason: Reason, detail: str) -> None:
        self.rejects.append(reject(self.batch, position, reason, detail))


def decode(batch: Batch, format: Format, tag: bytes, file_key: str) -> Documents:
    """The documents of a batch.

    Args:
        batch: the lines.
        format: NDJSON or TEXT.
        tag: the six bytes that begin each generated `_id`; the line's offset, 6 bytes big-endian, follows.
        file_key: stored with each line of text as `originalFile`.
    """
    return Documents(batch, format, tag, file_key)


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


def _objects(data: bytes, start: int, ends: list[int]) -> list[_Object] | None:
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


def _identities(batch: Batch, tag: bytes) -> tuple[bytes, ...]:
    """The twelve bytes of each line's `_id`."""
    count = batch.count
    offsets = np.empty(count, ">u8")
    offsets[0] = batch.offset
    offsets[1:] = batch.ends[:-1] + (batch.offset + 1)
    binary = np.empty((count, 12), np.uint8)
    binary[:, :6] = np.frombuffer(tag, np.uint8)
    binary[:, 6:] = offsets.view(np.uint8).reshape(count, 8)[:, 2:]
    return struct.unpack("12s" * count, binary.tobytes())


_KINDS: Final = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _may_have_wide_digits(data: bytes) -> bool:
    """Whether an integer may be outside int64; False is certain. Six times as fast as a scan of every byte.

    Such an integer has at least 19 digits, which always cover four whole words of four bytes and three more bytes next
    to them. A byte counts as a digit if its upper four bits are 3: 0 to 9, and :;<=>?.
    """
    words = np.frombuffer(data, "<u4", len(data) // 4) & np.uint32(0xF0F0F0F0) == np.uint32(0x30303030)
    at = 4 * np.flatnonzero(words[:-3] & words[1:-2] & words[2:-1] & words[3:])
    if not len(at):
        return False
    if at[0] < 3 or at[-1] + 22 > len(data):
        return True  # too close to the edge to look at the bytes around it
    # Fractions have up to 17 digits, so there may be many such places: they are all checked at once.
    octets = np.frombuffer(data, np.uint8)
    before, behind = (
        digits[0] * (1 + digits[1] * (1 + digits[2].astype(np.uint8)))
        for digits in ([octets[at + away] & 0xF0 == 0x30 for away in aways] for aways in ((-1, -2, -3), (16, 17, 18)))
    )
    places = at[before + behind >= 3]
    if len(places) > len(data) // SPARSE_BYTES:
        return True  # a scan of every byte takes no longer
    return any(_wide_at(data, place) for place in places.tolist())


def _wide_at(data: bytes, place: int) -> bool:
    """Whether the run of digits around a place may be an integer that int64 cannot hold."""
    left = data[max(place - _CERTAINLY_WIDE, 0) : place]
    before = left.rstrip(_DIGITS)
    right = data[place : place + _CERTAINLY_WIDE]
    start, end = place - len(left) + len(before), place + len(right) - len(right.lstrip(_DIGITS))
    if end - start < len(_RUN) or before.endswith(b"."):
        return False
    most = _INT64_MIN_LITERAL if before.endswith(b"-") else _INT64_MAX_LITERAL
    return end - start > len(_RUN) or data[start:end] > most


def _has_wide_digits(data: bytes) -> bool:
    """Whether any run of digits may be an integer that int64 cannot hold; scans all bytes, and few of them twice."""
    zeros = data.translate(_ZEROS)
    if zeros.rfind(_RUN) < 0:
        return False  # true of most data; searching from the right is faster by a third
    at = zeros.find(_RUN)
    while at >= 0:
        run = _DIGIT_RUN.match(zeros, at)
        assert run is not None  # it begins there
        before, end = zeros[at - 1 : at], run.end()
        most = _INT64_MIN_LITERAL if before == b"-" else _INT64_MAX_LITERAL
        # Digits after a decimal point are a fraction.
        if before != b"." and (end - at > len(_RUN) or data[at:end] > most):
            return True
        at = zeros.find(_RUN, end)
    return False


def _beyond_int64(line: bytes) -> str | None:
    """The first integer literal of a valid JSON text that int64 cannot hold, shortened; None if there is none."""
    if not _has_wide_digits(line):
        return None
    for match in _TOKEN.finditer(line):
        digits, rest = match.group(1), match.group(2)
        if digits is None or rest:
            continue
        if len(digits) >= _CERTAINLY_WIDE or not _INT64_MIN <= int(digits) <= _INT64_MAX:
            literal = digits.decode("ascii")
            return literal if len(literal) <= _CERTAINLY_WIDE else literal[:_CERTAINLY_WIDE] + "…"
    return None
