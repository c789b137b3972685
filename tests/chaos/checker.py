"""The independent checker: compares a whole file with a whole collection, in one thread, with no code of the engine.

It parses the file line by line with the standard library's JSON parser, works out which documents and rejects there
must be, and compares them with those that are stored. Documents are compared as BSON, byte for byte, so that a changed
type is noticed as well as a changed value.
"""

import base64
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field

import bson
from bson import ObjectId
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument

sys.setrecursionlimit(20_000)  # the standard library's parser recurses as deep as its input is nested

BLANK = re.compile(rb"[ \t\n\r\x0b\x0c]*")
DEPTH = 1024
"""The deepest nesting of a line that is valid JSON to the engine."""

SERVER_DEPTH = 180
"""The deepest nesting of a document that MongoDB accepts."""

MAX_BSON_BYTES = 16 * 1024 * 1024
"""The largest document that MongoDB accepts."""


@dataclass
class Verdict:
    """How many errors of each kind there are. `counts` lists wrong counts of the job; `examples` a few errors."""

    lost: int = 0
    duplicate: int = 0
    unexpected: int = 0
    mutated: int = 0
    rejects_missing: int = 0
    rejects_unexpected: int = 0
    counts: list = field(default_factory=list)
    examples: list = field(default_factory=list)

    @property
    def passed(self):
        return not any(asdict(self).values())

    def add(self, kind, example):
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {str(example)[:200]}")


class Bad(Exception):
    """A line that must become a reject, with its reason."""


def lines_of(stream):
    """Yields (offset, line without terminator, length with terminator) for each line of a binary file."""
    offset = 0
    for raw in stream:
        line = raw
        if line.endswith(b"\n"):
            line = line[:-1]
            if line.endswith(b"\r"):
                line = line[:-1]
        yield offset, line, len(raw)
        offset += len(raw)


def _integer(literal):
    number = int(literal) if len(literal) <= 40 else None
    if number is None or not -(2**63) <= number < 2**63:
        raise Bad("int_range")
    return number


def _no_constant(literal):
    raise Bad("invalid_json")


def depth_of(value):
    deepest, level = 0, [(value, 1)]
    while level:
        item, depth = level.pop()
        deepest = max(deepest, depth)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        level += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    return deepest


def document_of(line):
    """The document that a line must become. Raises Bad."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise Bad("invalid_json") from None
    if _nesting(text) > DEPTH:
        raise Bad("invalid_json")
    literals = []  # includes those under a repeated key, of which the parser keeps only the last value

    def keep(literal):
        literals.append(literal)
        return _checked_later(literal)

    try:
        value = json.loads(text, parse_int=keep, parse_float=_float, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Bad("invalid_json") from None
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise Bad("invalid_json") from None  # a lone surrogate
    if not isinstance(value, dict):
        raise Bad("not_an_object")
    kept = set(_large_numbers(value))
    for literal in literals:
        if _parsed(literal) in kept:
            _integer(literal)
    return _finished(value)


def _parsed(literal):
    """What the engine's parser makes of it."""
    return int(literal) if len(literal) <= 40 and -(2**63) <= int(literal) < 2**64 else float(literal)


def _large_numbers(value):
    level = [value]
    while level:
        item = level.pop()
        if isinstance(item, dict | list):
            level += item.values() if isinstance(item, dict) else item
        elif isinstance(item, Literal):
            _integer(item)
        elif isinstance(item, float) and abs(item) >= 2**63:
            yield item


def _checked_later(literal):
    # In a line that is not JSON, or not an object, an integer out of range is not the reason for the reject.
    _float(literal)
    return Literal(literal)


def _float(literal):
    number = float(literal)
    if math.isinf(number):
        raise Bad("invalid_json")  # the engine's parser refuses what no double can hold
    return number


class Literal(str):
    __slots__ = ()


def _finished(value):
    """The value with its literals as checked integers. Not recursive, since a line may be nested a thousand deep."""
    root = [value]
    level = [root]
    while level:
        box = level.pop()
        for key, item in list(box.items() if isinstance(box, dict) else enumerate(box)):
            if isinstance(item, Literal):
                box[key] = _integer(item)
            elif isinstance(item, dict | list):
                level.append(item)
    return root[0]


def _nesting(text):
    """The deepest nesting of brackets outside strings; 0 if there are too few brackets to exceed `DEPTH`."""
    if text.count("[") + text.count("{") <= DEPTH:
        return 0
    depth = most = 0
    for mark in re.sub(r'"(?:[^"\\]|\\.)*"', "", text):
        if mark in "[{":
            depth += 1
            most = max(most, depth)
        elif mark in "]}":
            depth -= 1
    return most


def encoded(document, identity):
    """The document as BSON, `_id` first. Raises Bad."""
    if any("\0" in key for key in _keys(document)):
        raise Bad("bad_key")
    own = document.get("_id")
    if "_id" in document and (isinstance(own, list) or (isinstance(own, dict) and any(k.startswith("$") for k in own))):
        raise Bad("bad_id")
    if depth_of(document) > SERVER_DEPTH:
        raise Bad("too_deep")
    data = bson.encode({"_id": identity, **document})
    if len(data) > MAX_BSON_BYTES:
        raise Bad("too_large")
    return data


def _keys(value):
    level = [value]
    while level:
        box = level.pop()
        if isinstance(box, dict):
            yield from box
        level += [item for item in (box.values() if isinstance(box, dict) else box) if isinstance(item, dict | list)]


def text_of(line, file_key):
    """The document that a line of text must become. Raises Bad."""
    try:
        return {"content": line.decode("utf-8"), "originalFile": file_key}
    except UnicodeDecodeError:
        raise Bad("invalid_utf8") from None


MAX_RAW_BYTES = 64 * 1024
"""The most bytes of its line that a reject keeps."""


@dataclass(frozen=True)
class _Wanted:
    """What the reject of a line must contain."""

    length: int
    reason: str
    number: int  # of the line, 0-based
    raw: bytes


def _says(reject, wanted, before):
    """Whether a reject contains what it must; `before` is as in `check`."""
    raw = reject["raw"].encode() if "encoding" not in reject else base64.b64decode(reject["raw"])
    # A truncated line may end up to three bytes early, before a character that would have been cut.
    whole = raw == wanted.raw or (
        wanted.length > MAX_RAW_BYTES and wanted.raw.startswith(raw) and len(raw) > MAX_RAW_BYTES - 4
    )
    code = {"duplicate_key": 11000, "refused": 121}.get(wanted.reason, reject.get("code"))
    return (
        whole
        and (reject["length"], reject["reason"], reject.get("code")) == (wanted.length, wanted.reason, code)
        and before[reject["range"]] + reject["ordinal"] == wanted.number
        and reject.get("rawLength") == (wanted.length if wanted.length > MAX_RAW_BYTES else None)
    )


def check(stream, collection, rejects, told, tag, before, limit, text_key=None, refuses=None):
    """Compare a file with the outcome of its first load; returns a Verdict.

    Args:
        stream: the file, opened for reading bytes.
        collection: the PyMongo collection that holds this file's documents and nothing else.
        rejects: the documents of this job in the PyMongo collection of rejects.
        told: the job's own counts: lines, inserted, duplicates, rejected, blank and bytes.
        tag: the six bytes that begin each generated `_id`.
        before: by range index, the number of lines before the range, according to the ledger.
        limit: the longest line that is not too large, in bytes.
        text_key: the file's key, if its lines are loaded as text.
        refuses: a key that the collection's validator refuses.
    """
    verdict, expected, bad, blank, lines, size = Verdict(), {}, {}, 0, 0, 0
    rivals = defaultdict(list)
    for offset, line, length in lines_of(stream):
        number, lines, size = lines, lines + 1, size + length
        body = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if BLANK.fullmatch(body):
            blank += 1
            continue
        try:
            if len(line) > limit:
                raise Bad("too_large")
            document = document_of(body) if text_key is None else text_of(body, text_key)
            if "_id" in document:
                data = encoded(document, document["_id"])
                claim = _Wanted(len(line), "duplicate_key", number, line[:MAX_RAW_BYTES])
                rivals[bson.encode({"": document["_id"]})].append((offset, claim, data))
            else:
                data = encoded(document, ObjectId(tag + offset.to_bytes(6, "big")))
                if refuses in document:
                    raise Bad("refused")
                expected[offset] = data
        except Bad as why:
            bad[offset] = _Wanted(len(line), str(why), number, line[:MAX_RAW_BYTES])
    documents = len(expected)
    seen = Counter()
    raw = collection.with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
    for found in raw.find({}, batch_size=5000):
        data, identity = bytes(found.raw), found["_id"]
        if isinstance(identity, ObjectId):
            offset = int.from_bytes(identity.binary[6:], "big")
            seen[offset] += 1
            if seen[offset] > 1:
                verdict.add("duplicate", identity)
            elif offset not in expected:
                verdict.add("unexpected", identity)
            elif expected.pop(offset) != data:
                verdict.add("mutated", identity)
        else:
            key = bson.encode({"": identity})
            if key not in rivals:
                verdict.add("unexpected", identity)
                continue
            claims = rivals.pop(key)
            if all(claim != data for _, _, claim in claims):
                verdict.add("mutated", identity)
            for offset, wanted, claim in claims:
                if claim != data:
                    bad[offset] = wanted
                else:
                    documents += 1
    for missing in [*expected, *rivals]:
        verdict.add("lost", missing)
    counts = {
        "lines": lines,
        "inserted": documents,
        "duplicates": 0,
        "rejected": len(bad),
        "blank": blank,
        "bytes": size,
    }
    verdict.counts = [f"{k}: {told[k]} instead of {v}" for k, v in counts.items() if told[k] != v]
    for reject in rejects:
        wanted = bad.pop(reject["_id"]["offset"], None)
        if wanted is None or not _says(reject, wanted, before):
            verdict.add("rejects_unexpected", (reject, wanted))
    for offset, wanted in bad.items():
        verdict.add("rejects_missing", (offset, wanted))
    return verdict
