"""What a load is compared with: the ceiling, and the database's own import tool if there is one."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import ceiling, importer
from bench.baselines import CONNECTIONS
from bench.rig import Rig
from bench.shapes import FULL_RECORDS, QUICK_RECORDS

Files = Callable[[str, int], Path]

SIZES = {
    "test_ceiling": (
        ("shape", "records", "connections"),
        [(*shape, connections) for shape in FULL_RECORDS.items() for connections in CONNECTIONS],
        [("ordinary", QUICK_RECORDS["ordinary"], 3)],
    ),
    "test_import_tool": (
        ("records", "workers"),
        [(FULL_RECORDS["ordinary"], workers) for workers in importer.WORKERS],
        [(QUICK_RECORDS["ordinary"], workers) for workers in importer.WORKERS],
    ),
}


@pytest.mark.benchmark(group="end to end")
def test_ceiling(measure: Any, rig: Rig, file: Files, quick: bool, shape: str, records: int, connections: int) -> None:
    """What the database can take: the same documents ready made, over a few raw connections."""
    path = file(shape, records)
    with path.open("rb") as lines:
        work = ceiling.batches(lines)
    host, port = rig.primary()

    def fresh() -> None:
        rig.store.data.drop_collection("ceiling")

    measure(
        lambda: ceiling.send(host, port, rig.store.data.name, "ceiling", work, connections),
        size=path.stat().st_size, records=records, rounds=2 if quick else 3, setup=fresh, shape=shape,
        batch=ceiling.BATCH_RECORDS, connections=connections,
    )  # fmt: skip
    assert rig.store.data["ceiling"].count_documents({}) == records
    fresh()


@pytest.mark.benchmark(group="end to end")
def test_import_tool(
    benchmark: BenchmarkFixture, measure: Any, rig: Rig, file: Files, quick: bool, records: int, workers: int
) -> None:
    """The database's own import tool with a local copy of the file; MONGOIMPORT names it."""
    tool = os.environ.get("MONGOIMPORT") or None
    candidates, note = importer.look(tool)
    if tool is None:
        pytest.skip(f"not measured: {note}, and pip cannot install one. Set it to the mongoimport of MongoDB's tools")
    assert candidates, note
    path = file("ordinary", records)
    taken: list[float] = []
    measure(
        lambda: taken.append(importer.run(rig, tool, path, workers, records)),
        size=path.stat().st_size, records=records, rounds=1 if quick else 3,
        shape="ordinary", processes=workers, tool=note,
    )  # fmt: skip
    # Without the check of the documents, and dropping them.
    benchmark.extra_info |= {"wall": round(statistics.median(taken), 3), "peak_rss_mb": None, "rss_growth_mb": None}
