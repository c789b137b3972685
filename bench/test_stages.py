"""One stage at a time on one core, in memory only: split, parse, encode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bson
import orjson
import pytest

from bench.shapes import SHAPES
from engine.model import Format
from engine.text.batches import Batch, Batcher
from engine.text.decode import decode, piece_bytes
from engine.text.encode import COMPILED, IDENTITY_BYTES, encode
from engine.text.lines import Block, Splitter

TAG = b"\0\0\0\0\0\0"
BATCHES = [100, 1000, 10_000]
COUNTS = {"ordinary": 20_000, "tiny": 20_000, "wide": 1000, "large": 500}

SHAPED = ("shape", "records", "batch")
CASES = [
    *(("ordinary", COUNTS["ordinary"], n) for n in BATCHES),
    *((s, COUNTS[s], 1000) for s in SHAPES if s != "ordinary"),
]

Files = Callable[[str, int], Path]


def _batches(data: bytes, records: int) -> list[Batch]:
    splitter, batcher = Splitter(0, len(data), 1 << 25), Batcher(records, 1 << 30)
    made = [batch for block in splitter.feed(data) for batch in batcher.add(block)]
    return [*made, *batcher.flush()]


@pytest.mark.benchmark(group="split")
@pytest.mark.parametrize("records", [COUNTS["ordinary"]])
@pytest.mark.parametrize("chunk", [64 * 1024, 1024 * 1024])
def test_split(measure: Any, file: Files, chunk: int, records: int) -> None:
    """Split chunks of bytes into lines."""
    data = file("ordinary", records).read_bytes()

    def split() -> int:
        splitter = Splitter(0, len(data), 1 << 25)
        blocks = (block for at in range(0, len(data), chunk) for block in splitter.feed(data[at : at + chunk]))
        return sum(len(block.ends) for block in blocks if isinstance(block, Block))

    assert measure(split, size=len(data), records=records, chunk=chunk, shape="ordinary") == records


@pytest.mark.benchmark(group="parse")
@pytest.mark.parametrize(SHAPED, CASES)
def test_parse(measure: Any, file: Files, shape: str, records: int, batch: int) -> None:
    """Parse lines into documents with their ids."""
    data = file(shape, records).read_bytes()
    batches = _batches(data, batch)

    def parse() -> int:
        return sum(sum(1 for _ in decode(b, Format.NDJSON, TAG, "key")) for b in batches)

    assert measure(parse, size=len(data), records=records, batch=batch, shape=shape) == records


@pytest.mark.benchmark(group="encode")
@pytest.mark.parametrize("by", ["extension", "driver"] if COMPILED else ["driver"])
@pytest.mark.parametrize(SHAPED, CASES)
def test_encode(measure: Any, file: Files, by: str, shape: str, records: int, batch: int) -> None:
    """Encode documents as BSON, as a worker does: the driver a command at a time, and the extension in C, if it is there, a
    piece of a batch at a time, so that `batch` makes little difference to it."""
    data = file(shape, records).read_bytes()
    batches = _batches(data, batch)
    parsed = [[orjson.loads(b.line(position)) for position in range(b.count)] for b in batches]
    with_ids = [list(decode(b, Format.NDJSON, TAG, "key")) for b in batches]
    most = max(1, piece_bytes(len(data), records) * records // len(data))  # documents of a piece
    pieces = [documents[at : at + most] for documents in parsed for at in range(0, len(documents), most)]

    def extension() -> int:
        size = 0
        for documents in pieces:
            made = encode(documents, bytes(IDENTITY_BYTES * len(documents)), checked=False)
            assert made is not None  # else the driver would have to
            size += len(made[0].raw)
        return size

    def driver() -> int:
        return sum(len(bson.encode({"documents": documents})) for documents in with_ids)

    given = {"by": by, "batch": batch, "piece": most if by == "extension" else batch, "shape": shape}
    assert (
        measure(extension if by == "extension" else driver, size=len(data), records=records, **given) >= len(data) // 2
    )
