"""Servers, files and notes for the suites. `--quick` makes everything small."""

import gc
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import shapes
from bench.rig import ROOT, Rig

Measure = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick`."""
    parser.addoption("--quick", action="store_true", help="small files and few rounds: under two minutes in all")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether everything is to be small."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Real servers."""
    with Rig(tmp_path_factory.mktemp("rig")) as made:
        yield made


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Files of a shape and a number of records, made once."""
    folder = tmp_path_factory.mktemp("files")

    def make(shape: str, count: int) -> Path:
        path = folder / f"{shape}-{count}.ndjson"
        if not path.exists():
            shapes.write(str(path), shape, count)
        return path

    return make


@pytest.fixture(scope="session")
def commit() -> str:
    """What is measured."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@pytest.fixture
def measure(benchmark: BenchmarkFixture, commit: str) -> Measure:
    """Run a function under the benchmark, and note what its time was spent on.

    `size` in bytes and `records` are of one call; `rounds` where one call takes seconds. Everything else goes into
    `extra_info` as it is. Returns what the function returned.
    """

    def run(function: Callable[..., Any], *given: Any, size: int, records: int, rounds: int = 0, **more: Any) -> Any:
        gc.collect()
        if rounds:
            result = benchmark.pedantic(  # type: ignore[no-untyped-call]
                function, given, rounds=rounds, iterations=1, warmup_rounds=0
            )
        else:
            result = benchmark(function, *given)
        info: dict[str, Any] = {"bytes": size, "records": records, "processes": 1, "commit": commit} | more
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
            info |= {"MB/s": round(size / seconds / 1e6, 1), "records/s": round(records / seconds, 1)}
        info.setdefault("peak_rss_mb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        benchmark.extra_info.update(info)
        return result

    return run
