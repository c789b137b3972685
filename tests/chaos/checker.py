"""The independent checker: one thread, nothing of the engine, the whole file against the whole collection.

It reads the file line by line with the standard library's JSON parser, works out which documents and which rejects there
must be, and compares them with what is stored, byte for byte of BSON, so that a type that changed is seen as well as a value.
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

sys.setrecursionlimit(20_000)  # the standard library's parser nests as deep as its input

BLANK = re.compile(rb"[ \t\n\r\x0b\x0c]*")
DEPTH = 1024
SERVER_DEPTH = 180
MAX_BSON_BYTES = 16 * 1024 * 1024


@dataclass
class Verdict:
    """What was found wrong; all zero and `counts` empty is a pass."""

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
    """(offset, line without terminator, length of the line with it) of a binary file."""
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
    # All literals of the line, those too whose key comes again and is overruled: the last one wins.
    literals = []

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
    for literal in literals:
        _integer(literal)
    return _finished(value)


def _checked_later(literal):
    # A bad integer in a line that is not JSON, or not an object, is not its fault.
    _float(literal)
    return Literal(literal)


def _float(literal):
    number = float(literal)
    if math.isinf(number):
        raise Bad("invalid_json")  # no double holds it, and the parser refuses it
    return number


class Literal(str):
    __slots__ = ()


def _finished(value):
    """The value with its integers checked; without recursion, since a line may nest a thousand deep."""
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
    """The deepest nesting of brackets outside strings; cheap where there can be none that matters."""
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


@dataclass(frozen=True)
class _Wanted:
    """What a reject must say of its line."""

    length: int
    reason: str
    number: int  # of the line, from 0
    raw: bytes


def _says(reject, wanted, before):
    """Whether a reject says of its line what it must."""
    raw = reject["raw"].encode() if "encoding" not in reject else base64.b64decode(reject["raw"])
    # A raw line that is cut may end before a character that the cut went through.
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
    """Compare a file with what became of it when it was loaded for the first time.

    Args:
        stream: the file, opened for reading bytes.
        collection: the PyMongo collection that holds this file's documents and nothing else.
        rejects: the documents of this job in the PyMongo collection of rejects.
        told: lines, inserted, duplicates, rejected, blank and bytes, as they are kept in the job.
        tag: the six bytes that begin each generated `_id`.
        before: for each range, by its index, how many lines stand before it, as the ledger has it.
        limit: the longest line, bytes.
        text_key: the file's key, where its lines are loaded as text.
        refuses: a key that the validator of the collection refuses.
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
