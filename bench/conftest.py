"""Fixtures of the benchmarks: servers, files and measurements. `--quick` makes everything small."""

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
    """Add `--quick`."""
    parser.addoption("--quick", action="store_true", help="small files and few rounds: under two minutes in all")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test from its entry in its module's `SIZES`: (names, full values, `--quick` values).

    The values become part of the test's name, so that a quick run is never compared with a full one.
    """
    sizes = getattr(metafunc.module, "SIZES", {}).get(metafunc.function.__name__)
    if sizes is not None:
        names, full, quick = sizes
        metafunc.parametrize(names, quick if metafunc.config.getoption("--quick") else full)


@pytest.fixture(scope="session", autouse=True)
def _tidy(request: pytest.FixtureRequest) -> None:
    """Leave no server and no file behind, however the run ends: by default pytest only tears down on Ctrl-C."""

    def leave(number: int) -> None:
        # If the exception is raised during a garbage collection, and so is lost, the session ends after this test.
        request.session.shouldstop = why = f"ended by {signal.Signals(number).name}"
        pytest.exit(why, pytest.ExitCode.INTERRUPTED)

    on_leave(leave)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether `--quick` was given."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Real servers, shared by all benchmarks."""
    with Rig(tmp_path_factory.mktemp("rig")) as made:
        yield made


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Path]]:
    """A function that returns a file of a shape with a number of records, written once."""
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
    """The commit that is measured."""
    return current_commit()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, commit: str) -> Measure:
    """Benchmark a function and record the memory it took and its rates; returns what the function returned.

    `size` (bytes) and `records` are per call. `rounds` is for calls that take seconds, or that need `setup` before
    each. `peak_rss_mb` is the peak memory of process `pid` (default: this one) during the run, including what was there
    before, such as modules and what earlier tests left; `rss_growth_mb` is the increase during the run. Further keyword
    arguments go into `extra_info` unchanged.
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
            # None if there are none: a benchmark of the queue moves no bytes.
            info |= {"MB/s": round(size / seconds / 1e6, 1) if size else None}
            info |= {"records/s": round(records / seconds, 1) if records else None}
        benchmark.extra_info.update(info)
        return result

    return run
