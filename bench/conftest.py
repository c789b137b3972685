"""Servers, files and notes for the suites. `--quick` makes everything small."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import shapes
from bench.rig import Rig, current_commit, forget_peak, on_leave, peak_mb

Measure = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick`."""
    parser.addoption("--quick", action="store_true", help="small files and few rounds: under two minutes in all")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`records` or `size` of a test come from `SIZES` of its module: (full, quick).

    They are in the names, so that what `--quick` measured is never held against a full run.
    """
    sizes = getattr(metafunc.module, "SIZES", {}).get(metafunc.function.__name__)
    if sizes is not None:
        names, full, quick = sizes
        metafunc.parametrize(names, quick if metafunc.config.getoption("--quick") else full)


@pytest.fixture(scope="session", autouse=True)
def _tidy(request: pytest.FixtureRequest) -> None:
    """However this is ended, no server and no file stays: by itself, pytest leaves through its fixtures on Ctrl-C only."""

    def leave(number: int) -> None:
        # Where the exception is lost, in the midst of a collection of garbage, this test is the last one.
        request.session.shouldstop = why = f"ended by {signal.Signals(number).name}"
        pytest.exit(why, pytest.ExitCode.INTERRUPTED)

    on_leave(leave)


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
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Path]]:
    """Files of a shape and a number of records, made once."""
    folder = tmp_path_factory.mktemp("lines")

    def make(shape: str, count: int) -> Path:
        path = folder / f"{shape}-{count}.ndjson"
        if not path.exists():
            shapes.write(path, shape, count)
        return path

    yield make
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def commit() -> str:
    """What is measured."""
    return current_commit()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, commit: str) -> Measure:
    """Run a function under the benchmark, and note what its time was spent on.

    `size` in bytes and `records` are of one call; `rounds` where one call takes seconds, or where `setup` makes what it is
    called with. `peak_rss_mb` is the peak of the memory of process `pid`, this one if none is named, while it ran. In it is
    what was there before: modules, and what earlier tests left; `rss_growth_mb` is how much came while it ran. Everything else
    goes into `extra_info` as it is. Returns what the function returned.
    """

    def run(
        function: Callable[..., Any],
        *,
        size: int,
        records: int,
        rounds: int = 0,
        setup: Callable[[], Any] | None = None,
        pid: int = 0,
        **more: Any,
    ) -> Any:
        gc.collect()
        pid = pid or os.getpid()
        forget_peak(pid)
        before = peak_mb(pid)
        result = (
            benchmark.pedantic(function, setup=setup, rounds=rounds)  # type: ignore[no-untyped-call]
            if rounds
            else benchmark(function)
        )
        info: dict[str, Any] = {"bytes": size, "records": records, "processes": 1, "commit": commit}
        info |= {
            "batch": None,
            "shape": None,
            "peak_rss_mb": (peak := peak_mb(pid)),
            "rss_growth_mb": peak - before,
        } | more
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
            # None where there are none: a benchmark of the queue moves no bytes.
            info |= {"MB/s": round(size / seconds / 1e6, 1) if size else None}
            info |= {"records/s": round(records / seconds, 1) if records else None}
        benchmark.extra_info.update(info)
        return result

    return run
