"""End to end: from an object in S3 to documents in MongoDB, by an engine in processes of its own."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.rig import Rig, Taken
from bench.shapes import FULL_RECORDS, QUICK_RECORDS
from engine.control.stats import totals

Files = Callable[[str, int], Path]

CASES = [
    *(("ordinary", workers, "64MiB", 1000) for workers in (1, 2, 4)),
    *(("ordinary", 2, size, 1000) for size in ("1MiB", "8MiB")),
    *(("ordinary", 2, "64MiB", batch) for batch in (100, 10_000)),
    *((shape, 2, "64MiB", 1000) for shape in ("tiny", "wide", "large")),
]
# The quick files are so small that a limit of 64 MiB gives ranges of 8 MiB too, the least that the planner chooses.
QUICK_CASES = [case for case in CASES if case[2] != "8MiB"]
SIZES = {
    "test_load": (
        ("shape", "records", "workers", "range_bytes", "batch"),
        [(shape, FULL_RECORDS[shape], *rest) for shape, *rest in CASES],
        [(shape, QUICK_RECORDS[shape], *rest) for shape, *rest in QUICK_CASES],
    ),
}


@pytest.mark.benchmark(group="end to end")
def test_load(
    benchmark: BenchmarkFixture,
    measure: Any,
    rig: Rig,
    file: Files,
    quick: bool,
    shape: str,
    records: int,
    workers: int,
    range_bytes: str,
    batch: int,
) -> None:
    """From the submission to COMPLETED; the engine is already running."""
    source = rig.upload(file(shape, records))
    changes: dict[str, Any] = {"engine_range_bytes": range_bytes, "engine_batch_records": batch}
    if batch > 1000:
        changes["engine_batch_bytes"] = "4MiB"  # else a batch is full before it has this many lines
    taken: list[Taken] = []
    before = totals(rig.store)

    def forget() -> None:
        """Check the last load and drop its documents before the next."""
        if taken:
            rig.check(taken[-1].job)

    with rig.engine(workers, **changes) as engine:
        measure(
            lambda: taken.append(rig.load(source, engine)),
            size=source.size, records=records, rounds=2 if quick else 3, setup=forget, processes=workers, shape=shape,
        )  # fmt: skip
    forget()
    after = totals(rig.store)  # the engine reports its last figures as it stops

    def median(figure: Callable[[Taken], float]) -> float:
        return round(statistics.median(map(figure, taken)), 3)

    plan = taken[-1].job.plan
    assert plan is not None
    lines, batches = (after[name] - before.get(name, 0) for name in ("lines", "batches"))
    benchmark.extra_info.update(
        {
            "batch": round(lines / batches),
            "batch_most": batch,
            "ranges": plan.range_count,
            "range_bytes": plan.range_bytes,
            "range_bytes_most": range_bytes,
            "wall": (wall := median(lambda one: one.wall)),
            # From the database's timestamps: the benchmark's own time includes the wait for the next poll.
            "MB/s": round(source.size / wall / 1e6, 1),
            "records/s": round(records / wall, 1),
            "worker_cpu": median(lambda one: one.cpu),
            "mongod_cpu": median(lambda one: one.servers["mongod"]),
            "s3_cpu": median(lambda one: one.servers["weed"]),
            "peak_rss_mb": max(one.peak_mb for one in taken),
            "rss_growth_mb": None,  # not known: the peak is the workers', since the engine started
        }
    )
