"""End to end: an object in S3 to documents in MongoDB, by an engine in processes of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.rig import Rig

Files = Callable[[str, int], Path]

COUNTS = {"ordinary": 1_000_000, "tiny": 1_000_000, "wide": 60_000, "large": 20_000}
QUICK = {"ordinary": 100_000, "tiny": 100_000, "wide": 6000, "large": 2000}

CASES = [
    *(("ordinary", workers, "64MiB", 1000) for workers in (1, 2, 4)),
    *(("ordinary", 2, size, 1000) for size in ("1MiB", "8MiB")),
    *(("ordinary", 2, "64MiB", batch) for batch in (100, 10_000)),
    *((shape, 2, "64MiB", 1000) for shape in ("tiny", "wide", "large")),
]


@pytest.mark.benchmark(group="end to end")
@pytest.mark.parametrize(("shape", "workers", "range_bytes", "batch"), CASES)
def test_load(
    benchmark: BenchmarkFixture,
    measure: Any,
    rig: Rig,
    file: Files,
    quick: bool,
    shape: str,
    workers: int,
    range_bytes: str,
    batch: int,
) -> None:
    """From the submission to COMPLETED; the engine runs already."""
    count = (QUICK if quick else COUNTS)[shape]
    path = file(shape, count)
    source = rig.upload(path)
    changes = {"engine_range_bytes": range_bytes, "engine_batch_records": batch}
    engine = rig.engine(workers, **changes)
    peak = []

    def load() -> int:
        taken = rig.load(source, engine)
        peak.append(taken.peak_mb)
        return taken.lines

    try:
        lines = measure(
            load, size=source.size, records=count, rounds=1 if quick else 3, processes=workers, batch=batch,
            range_bytes=range_bytes, shape=shape,
        )  # fmt: skip
        assert lines == count
        benchmark.extra_info["peak_rss_mb"] = max(peak)
    finally:
        engine.stop()
