"""One core, one stage at a time: split, decode, encode. Figures per batch of lines, on the seeded sample."""

from typing import Any

import bson
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine import sample
from engine.batches import Batch
from engine.decode import decode
from engine.lines import Splitter
from engine.model import Format

RECORDS = 20_000
TAG = b"\0\0\0\0\0\0"


@pytest.fixture(scope="module")
def data() -> bytes:
    """The sample's bytes."""
    return b"".join(sample.lines(RECORDS))


def _batch(data: bytes, records: int) -> Batch:
    lines = data.split(b"\n")[:records]
    return Batch(0, sum(map(len, lines)) + len(lines), 0, lines)


def _note(benchmark: BenchmarkFixture, size: int, records: int) -> None:
    benchmark.extra_info.update({"bytes": size, "records": records})


@pytest.mark.benchmark(group="split")
@pytest.mark.parametrize("chunk", [64 * 1024, 1024 * 1024])
def test_split(benchmark: BenchmarkFixture, data: bytes, chunk: int) -> None:
    """Chunks of bytes into lines."""

    def split() -> int:
        splitter = Splitter(0, len(data), 1 << 25)
        blocks = (block for at in range(0, len(data), chunk) for block in splitter.feed(data[at : at + chunk]))
        return sum(len(getattr(block, "lines", ())) for block in blocks)

    _note(benchmark, len(data), RECORDS)
    assert benchmark(split) == RECORDS


@pytest.mark.benchmark(group="parse")
@pytest.mark.parametrize("records", [100, 1000, 10_000])
def test_decode(benchmark: BenchmarkFixture, data: bytes, records: int) -> None:
    """Lines into documents with their ids."""
    batch = _batch(data, records)
    _note(benchmark, batch.end, records)
    assert len(benchmark(decode, batch, Format.NDJSON, TAG, "sample").documents) == records


@pytest.mark.benchmark(group="encode")
@pytest.mark.parametrize("records", [100, 1000, 10_000])
def test_encode(benchmark: BenchmarkFixture, data: bytes, records: int) -> None:
    """Documents into BSON."""
    batch = _batch(data, records)
    documents: list[dict[str, Any]] = decode(batch, Format.NDJSON, TAG, "sample").documents
    _note(benchmark, batch.end, records)
    assert benchmark(bson.encode, {"documents": documents})
