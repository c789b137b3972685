"""One line to one document or one reject, through orjson. Pure: no I/O, and no bad line ever raises.

What becomes of a line depends on its bytes and its offset alone, so that a replay gives the same documents.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import orjson

from engine.batches import Batch
from engine.lines import HEAD_BYTES
from engine.model import Format, Reason, Reject

__all__ = ["Decoded", "Identity", "decode", "reject"]

BOM: Final = b"\xef\xbb\xbf"

# The smallest integer outside int64 has 19 digits. All digits made '0', a run of 19 is one `find` away.
_ZEROS: Final = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))
_RUN: Final = b"0" * 19
_MOST: Final = b"%d" % (2**63 - 1)
_MOST_BELOW: Final = b"%d" % 2**63
_MINUS: Final = ord("-")

# Strings are matched first, so that digits within them are passed over; then numbers, whole, to see if they are integers.
_TOKEN: Final = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"|(-?\d{19,}+)((?:\.\d+)?(?:[eE][+-]?\d+)?)|\d++(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL
)
_PLUS_NEWLINE: Final = (1).__add__
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
# Longer than any int64; int() of a literal of thousands of digits is refused by Python itself.
_INT64_DIGITS: Final = 40


class Identity:
    """A generated `_id`: encoded as the ObjectId of these twelve bytes, and made in a third of the time.

    `_type_marker` is by what PyMongo's encoder knows the types of BSON; 7 is an ObjectId, and `binary` its bytes.
    """

    __slots__ = ("binary",)
    _type_marker = 7

    def __init__(self, binary: bytes) -> None:
        self.binary = binary


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of a batch.

    `documents[i]` came from line `positions[i]` of the batch; those in `own_ids` (indexes into `documents`) brought
    their own `_id`. `blank` counts lines of white space only.
    """

    documents: list[dict[str, object]]
    positions: Sequence[int]
    own_ids: list[int]
    rejects: list[Reject]
    blank: int


def reject(batch: Batch, position: int, reason: Reason, detail: str, code: int | None = None) -> Reject:
    """The reject of line `position` of `batch`."""
    if batch.oversized is not None:
        line, length, offset = batch.oversized.head, batch.oversized.length, batch.offset
    else:
        line = batch.lines[position]
        offset = batch.offset + sum(map(len, batch.lines[:position])) + position
        length = len(line)
        # Without a newline after it, a carriage return is a part of the line.
        if line.endswith(b"\r") and (position < len(batch.lines) - 1 or batch.terminated):
            length -= 1
    head = line[: min(length, HEAD_BYTES)]
    return Reject(offset, length, batch.ordinal + position, reason, detail, head, code)


def decode(batch: Batch, format: Format, tag: bytes, file_key: str) -> Decoded:
    """Decode the lines of a batch.

    Args:
        batch: the lines.
        format: NDJSON or TEXT.
        tag: the six bytes that begin each generated `_id`; the line's offset, 6 bytes big-endian, follows.
        file_key: stored with each line of text as `originalFile`.
    """
    if batch.oversized is not None:
        detail = f"the line has {batch.oversized.length} bytes, more than ENGINE_MAX_LINE_BYTES allows"
        return Decoded([], [], [], [reject(batch, 0, Reason.TOO_LARGE, detail)], 0)
    if format is Format.TEXT:
        return _text(batch, tag, file_key)
    return _ndjson(batch, tag)


def _ndjson(batch: Batch, tag: bytes) -> Decoded:
    lines = batch.lines
    try:
        # What most batches are: documents all. Each step is one call over the whole batch, since a line of Python for
        # each record costs as much as parsing it.
        documents = list(map(orjson.loads, lines))
    except orjson.JSONDecodeError:
        return _one_by_one(batch, tag)
    if set(map(type, documents)) != {dict} or _has_wide_digits(b"\n".join(lines)):
        return _one_by_one(batch, tag)
    own_ids = [index for index, document in enumerate(documents) if "_id" in document]
    for document, identity in zip(documents, _identities(batch, tag), strict=True):
        document.setdefault("_id", identity)
    return Decoded(documents, range(len(documents)), own_ids, [], 0)


def _identities(batch: Batch, tag: bytes) -> list[Identity]:
    """The identity of each line of the batch."""
    count = len(batch.lines)
    offsets = accumulate(map(_PLUS_NEWLINE, map(len, batch.lines)), initial=batch.offset)
    packed = struct.pack(f">{count + 1}Q", *offsets)
    return [Identity(tag + packed[at : at + 6]) for at in range(2, 8 * count, 8)]


def _one_by_one(batch: Batch, tag: bytes) -> Decoded:
    """As `_ndjson`, for a batch in which some line is bad, blank, or holds a long run of digits."""
    documents: list[dict[str, object]] = []
    positions: list[int] = []
    own_ids: list[int] = []
    rejects: list[Reject] = []
    blank = 0
    identities = _identities(batch, tag)
    for position, line in enumerate(batch.lines):
        body = line.removeprefix(BOM) if batch.offset == position == 0 else line
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            if not body.strip():
                blank += 1
            else:
                rejects.append(reject(batch, position, Reason.INVALID_JSON, str(error)))
            continue
        if type(document) is not dict:
            detail = f"the line is {_KINDS[type(document)]}, not an object"
            rejects.append(reject(batch, position, Reason.NOT_AN_OBJECT, detail))
        elif literal := _beyond_int64(body):
            detail = f"the integer {literal} does not fit into 64 bits"
            rejects.append(reject(batch, position, Reason.INT_RANGE, detail))
        else:
            if "_id" in document:
                own_ids.append(len(documents))
            else:
                document["_id"] = identities[position]
            documents.append(document)
            positions.append(position)
    return Decoded(documents, positions, own_ids, rejects, blank)


_KINDS: Final = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _has_wide_digits(data: bytes) -> bool:
    """Whether any run of digits may be an integer that int64 cannot hold; a look at all bytes, and at few of them twice."""
    zeros = data.translate(_ZEROS)
    if zeros.rfind(_RUN) < 0:
        return False  # of most data; from the right, the search is a third quicker
    at = zeros.find(_RUN)
    while at >= 0:
        before = zeros[at - 1] if at else 0
        # Behind a point stands a fraction, and behind a digit the rest of one.
        if before not in b".0" and (
            zeros.startswith(b"0", at + len(_RUN))
            or data[at : at + len(_RUN)] > (_MOST_BELOW if before == _MINUS else _MOST)
        ):
            return True
        at = zeros.find(_RUN, at + 1)
    return False


def _beyond_int64(line: bytes) -> str | None:
    """The first integer literal of a valid JSON text that int64 cannot hold, shortened; None where there is none."""
    if not _has_wide_digits(line):
        return None
    for match in _TOKEN.finditer(line):
        digits, rest = match.group(1), match.group(2)
        if digits is None or rest:
            continue
        if len(digits) >= _INT64_DIGITS or not _INT64_MIN <= int(digits) <= _INT64_MAX:
            literal = digits.decode("ascii")
            return literal if len(literal) <= _INT64_DIGITS else literal[:_INT64_DIGITS] + "…"
    return None


def _text(batch: Batch, tag: bytes, file_key: str) -> Decoded:
    documents: list[dict[str, object]] = []
    positions: list[int] = []
    rejects: list[Reject] = []
    blank = 0
    offset = batch.offset
    last = len(batch.lines) - 1
    terminated = batch.terminated
    for position, line in enumerate(batch.lines):
        body = line[:-1] if line.endswith(b"\r") and (position < last or terminated) else line
        if offset == 0 and body.startswith(BOM):
            body = body[len(BOM) :]
        if not body.strip():
            blank += 1
        else:
            try:
                content = body.decode("utf-8")
            except UnicodeDecodeError as error:
                detail = f"byte {error.start} of the line, 0x{body[error.start]:02x}: {error.reason}"
                rejects.append(reject(batch, position, Reason.INVALID_UTF8, detail))
            else:
                _id = Identity(tag + offset.to_bytes(6, "big"))
                documents.append({"_id": _id, "content": content, "originalFile": file_key})
                positions.append(position)
        offset += len(line) + 1
    return Decoded(documents, positions, [], rejects, blank)
