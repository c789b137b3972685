"""Mutation fuzzing of `lines` and `decode`: any line becomes one document, one reject, or one blank line."""

import io
import random
import time

import bson
from bson.raw_bson import DEFAULT_RAW_BSON_OPTIONS as RAW

from engine.model import Format
from engine.text import decode as decoding
from engine.text.batches import Batcher
from engine.text.decode import decode
from engine.text.encode import Encoded
from engine.text.lines import Splitter
from tests.chaos import corpus
from tests.chaos.checker import BLANK, Bad, document_of, lines_of
from tests.chaos.rig import Report

SECONDS = {True: 15, False: 600}
TAG = b"\0" * 6


def fuzz(settings, folder, short):
    """Mutate lines of the corpus for ten minutes (15 seconds if `short`); the checker says what each must become."""
    report = Report("fuzz", {"mutations": 0})
    draw = random.Random(12 if short else 11)
    end = time.monotonic() + SECONDS[short]
    while time.monotonic() < end and len(report.problems) < 5:
        data = mutated(draw)
        report.faults["mutations"] += 1
        report.records += data.count(b"\n")
        try:
            compare(data, draw, report)
        except Exception as error:  # noqa: BLE001 (any exception is a finding)
            report.problems.append(f"{type(error).__name__} on {data[:300]!r}: {error}")
    return report


def mutated(draw):
    """Some lines of the corpus with a few bytes changed, doubled, dropped or swapped."""
    lines = [corpus.good(draw, n) if draw.random() < 0.7 else corpus.bad(draw, draw.randrange(5000)) for n in range(12)]
    data = bytearray(draw.choice([b"\n", b"\r\n"]).join(line[:3000] for line in lines))
    for _ in range(draw.randrange(8)):
        at, length = draw.randrange(len(data)), draw.randrange(1, 12)
        match draw.randrange(5):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = draw.choice(
                    [b"\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"9" * 20, b'"', b"{", b"[" * 30, b"\\u0000"]
                )
            case 4:
                data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


def compare(data, draw, report):
    """Read `data`, cut at random into ranges and chunks, and compare the outcome of each line with the checker's."""
    cut = draw.randrange(1, len(data) + 2)
    wanted = {}
    for offset, line, _ in lines_of(io.BytesIO(data)):
        body = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if BLANK.fullmatch(body):
            wanted[offset] = "blank"
            continue
        try:
            wanted[offset] = document_of(body)
        except Bad as why:
            wanted[offset] = str(why)
    found = {}
    decoding.PIECE_BYTES = draw.choice([1, 100, 32 * 1024])
    for start in range(0, len(data), cut):
        read(data, start, min(start + cut, len(data)), draw, found)
    for offset, expected in wanted.items():
        got = found.pop(offset, "nothing")
        right = got == expected if isinstance(expected, str) else isinstance(got, dict) and same(got, expected)
        if not right:
            report.problems.append(f"byte {offset} of {data[:400]!r}: {got!r} instead of {expected!r}")
            return
    if found:
        report.problems.append(f"{found} out of nothing in {data[:400]!r}")


def same(got, expected):
    """Whether two documents are equal as BSON, or by `repr` if they cannot be encoded. A generated `_id` is ignored."""
    if "_id" not in expected:
        got = {k: v for k, v in got.items() if k != "_id"}
    try:
        return bson.encode(got) == bson.encode(expected)
    except Exception:  # noqa: BLE001 (a key with NUL, or too deep: the sink rejects these later)
        return repr(got) == repr(expected)


def compare_encoded(decoded, documents):
    """Compare what a pass gives to the driver with what the driver makes of the same documents."""
    left = iter(documents)
    for part in decoded.encoded():
        if isinstance(part, Encoded):
            if not part.raw:
                raise AssertionError("an empty piece, which the driver takes for an error")
            for raw in bson.decode_file_iter(io.BytesIO(part.raw), RAW):
                document = next(left)
                if raw.raw != bson.encode({"_id": document["_id"], **document}):
                    raise AssertionError(f"{document!r} is encoded as {raw.raw!r}")
        elif repr(part) != repr(next(left)):
            raise AssertionError(f"{part!r} in place of another document")
    if list(left):
        raise AssertionError("documents are missing in the pass for the driver")


def read(data, start, end, draw, found):
    """Pass one range of `data` through splitter, batcher and decoder; adds the outcomes to `found`, by offset."""
    splitter, batcher, at = Splitter(start, end, 10**6), Batcher(draw.randrange(1, 9), 10**5), 0
    batches = []
    at = splitter.read_from
    while not splitter.done and at < len(data):
        step = draw.randrange(1, 2000)
        for block in splitter.feed(data[at : at + step]):
            batches += batcher.add(block)
        at += step
    if not splitter.done:
        for block in splitter.finish():
            batches += batcher.add(block)
    batches += batcher.flush()
    for batch in batches:
        decoded = decode(batch, Format.NDJSON, TAG, "key")
        documents = list(decoded)
        compare_encoded(decoded, documents)
        offsets = [batch.offset + batch.start(position) for position in range(batch.count)]
        outcome = dict.fromkeys(offsets, "blank")
        for reject in decoded.rejects:
            outcome[reject.offset] = str(reject.reason)
        for position, document in zip(decoded.positions, documents, strict=True):
            outcome[offsets[position]] = document
        if sum(value == "blank" for value in outcome.values()) != decoded.blank:
            raise AssertionError("the blank lines are counted wrong")
        for offset, value in outcome.items():
            if offset in found:
                raise AssertionError(f"byte {offset} came twice")
            found[offset] = value
