"""`python -m bench.report [--quick] [--gigabytes N]`: measure everything against the ceiling, and write bench/REPORT.md.

Every figure is from this run, on this machine.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from api.commands.terminal import EXIT_INTERRUPTED
from bench import measure, shapes
from bench.page import Judge, Report, write
from bench.rig import ROOT, Rig, current_commit, on_leave
from bench.verdicts import MAX_MEMORY_MB, flat

__all__ = ["main", "room", "stated"]

HERE: Final = ROOT / "bench"
GIGABYTES: Final = 10
"""Default size of the memory test's largest file, in GB."""

LEFT_BYTES: Final = 12 * 10**9
QUICK_LEFT_BYTES: Final = 10**9
"""Space on the disk that the files, objects and documents of earlier sections take during the memory test: SeaweedFS
frees that of deleted uploads only later."""


def _judge(name: str, holds: Callable[[float], bool], digits: int) -> Judge:
    """Judge a figure by its median, and show it with as many digits as it takes to see why."""

    def judge(found: dict[str, Any]) -> tuple[str, bool]:
        median = found[name].median
        met = holds(median)
        told = next(number for number in range(digits, 18) if holds(round(median, number)) is met)
        return found[name].text(told), met

    return judge


def _most(name: str, limit: float, digits: int = 2) -> Judge:
    return _judge(name, lambda median: median <= limit, digits)


def _less(name: str, limit: float, digits: int = 2) -> Judge:
    return _judge(name, lambda median: median < limit, digits)


def _least(name: str, limit: float, digits: int = 2) -> Judge:
    return _judge(name, lambda median: median >= limit, digits)


def _imported(found: dict[str, Any]) -> tuple[str, bool | None]:
    note = found["import note"]
    if "import ratio" not in found:
        return f"not measured: {note}", None
    told, met = _least("import ratio", 2.5)(found)
    return f"{told} ({note})", met


def sizes(quick: bool, gigabytes: int) -> list[int]:
    """Sizes in bytes of the memory test's files, the largest last."""
    return [5 * 10**7, 10**8] if quick else sorted({10**8, min(10**9, gigabytes * 10**9), gigabytes * 10**9})


def room(quick: bool, gigabytes: int) -> int:
    """Bytes of disk that the whole report needs."""
    return measure.room_for(sizes(quick, gigabytes)[-1]) + (QUICK_LEFT_BYTES if quick else LEFT_BYTES)


def stated(quick: bool, gigabytes: int, tool: str | None) -> str:
    """The command that repeats this measurement."""
    given = {"GIGABYTES": str(gigabytes) if gigabytes != GIGABYTES else None, "QUICK": "1" if quick else None}
    given["MONGOIMPORT"] = tool
    return " ".join(["make bench-report", *(f"{name}={shlex.quote(value)}" for name, value in given.items() if value)])


def run(
    rig: Rig, files: Path, quick: bool, gigabytes: int, tool: str | None, heed: Callable[[], None] = lambda: None
) -> Report:
    """Measure everything; `heed` is called before each section and raises if the report is to end."""
    rounds, few = (1, 1) if quick else (9, 3)
    count = 100_000 if quick else 1_000_000
    report = Report({"ordinary": count, "tiny": count, "wide": count // 16, "large": count // 50}, heed=heed)

    def file(name: str, records: int) -> Path:
        path = files / f"{name}-{records}.ndjson"
        if not path.exists():
            part = path.with_suffix(".part")
            try:
                shapes.write(part, name, records)
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)
        return path

    ordinary = partial(file, "ordinary", count)
    report.measure(
        "ladder", lambda: measure.ladder(rig, ordinary(), rounds, tool),
        ("wall, over the ceiling's", "≤ 1.5", _most("wall ratio", 1.5)),
        ("workers' CPU, over parsing and encoding as Python runs them", "≤ 2.5", _most("cpu ratio", 2.5)),
        ("the same, Python's collector off for both", "≤ 2.5", _most("cpu ratio, collector off", 2.5)),
        ("import tool's wall, over Headrace's", "≥ 2.5", _imported),
    )  # fmt: skip
    for name in ("tiny", "wide", "large"):
        report.measure(
            name, partial(lambda name: measure.shape(rig, file(name, report.records[name]), few), name),
            (f"{name} records, wall over the ceiling's", "≤ 1.5", _most("ratio", 1.5)),
            (f"{name} records, the ceiling with parsing beside it, over the ceiling's", "–", _most("floor", 1.5)),
        )  # fmt: skip
    report.measure(
        "small", lambda: measure.small_files(rig, 200 if quick else 2000, 100, few),
        ("small files, jobs a second", "≥ 100", _least("jobs/s", 100, 0)),
        ("small files, % of that time in which a worker waits for the queue", "–", _most("queue %", 100, 0)),
    )  # fmt: skip
    report.measure("scale", lambda: measure.scale(rig, ordinary(), few))
    report.measure(
        "pick-up", lambda: {"ms": measure.pickup(rig, 10 if quick else 40)},
        ("pick-up on an idle fleet, ms", "< 100", _less("ms", 100, 0)),
    )  # fmt: skip
    report.measure(
        "idle", lambda: {"share": measure.idle(rig, 5 if quick else 30, few)},
        ("idle engine, % of a core", "< 1", _less("share", 1)),
    )  # fmt: skip
    report.measure(
        "upload", lambda: measure.upload(rig, 2**27 if quick else 2**30, few),
        ("POST /upload, over boto3's upload_file", "≥ 0.5", _least("over boto3", 0.5)),
        ("the same, over upload_file with Headrace's settings of boto3", "–", _least("over boto3, tuned", 0.5)),
    )  # fmt: skip
    report.measure(
        "latency", lambda: measure.latency(rig, ordinary(), 1 if quick else 4),
        (f"rate with {measure.ADDED_MILLISECONDS} ms added on both sides", "≥ 0.8", _least("share", 0.8)),
    )  # fmt: skip
    for name, varied in measure.VARIED.items():
        report.measure(
            f"defaults, {name}",
            partial(
                lambda name, varied: measure.defaults(rig, file(name, report.records[name]), few, varied), name, varied
            ),
        )
    # Last, so that what they leave on the disk and in the database's cache affects no other section.
    report.measure(
        "memory", lambda: measure.memory(rig, sizes(quick, gigabytes)),
        ("peak memory of a worker, MB (lines up to 1 MiB)", f"< {MAX_MEMORY_MB}, flat (15 %)", flat),
    )  # fmt: skip
    report.measure(
        "dense memory", lambda: measure.dense_memory(rig, 10**8),
        (f"the same, each line 1 MiB of {' or '.join(measure.DENSE)}", f"< {MAX_MEMORY_MB}", flat),
    )  # fmt: skip
    return report


def main() -> None:
    """Measure and write the report; exit with 1 if something could not be measured."""
    heed = on_leave(lambda number: sys.exit(EXIT_INTERRUPTED if number == signal.SIGINT else 1))
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small and once, to see that it works; prints the report only"
    )
    parser.add_argument("--gigabytes", type=int, default=GIGABYTES, help="size of the largest file of the memory test")
    asked = parser.parse_args()
    if asked.gigabytes < 1:
        parser.error(f"--gigabytes {asked.gigabytes} is no size of a file: give 1 or more")
    # Report what is missing before anything is measured.
    if not find_spec("matplotlib"):
        parser.error("matplotlib, which draws the pictures, is not installed: pip install -e '.[bench]'")
    tool = os.environ.get("MONGOIMPORT") or None
    if tool and not shutil.which(tool):
        parser.error(f"MONGOIMPORT={tool} is no program: name the database's import tool, or unset it")
    free, needed = shutil.disk_usage(tempfile.gettempdir()).free, room(asked.quick, asked.gigabytes)
    if free < needed:
        parser.error(
            f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free, and this needs up to {needed / 1e9:.1f}: free some, set "
            "TMPDIR to a folder that has more, or measure a smaller file with GIGABYTES=1"
        )
    began, commit = time.monotonic(), current_commit()
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    command = stated(asked.quick, asked.gigabytes, tool)
    try:
        with Rig(folder / "rig") as rig:
            cache_bytes = rig.cache_bytes()
            report = run(rig, folder, asked.quick, asked.gigabytes, tool, heed)
        # A quick run's figures mean nothing: they must not replace those of the report.
        place = folder if asked.quick else HERE
        write(report, command, time.monotonic() - began, place, cache_bytes, commit, kept=not asked.quick)
        print((place / "REPORT.md").read_text() if asked.quick else f"Written: {place / 'REPORT.md'}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    import_failed = tool is not None and "import ratio" not in report.found.get("ladder", {})
    no_room = any(None in report.found.get(name, {}).values() for name in ("memory", "dense memory"))
    sys.exit(1 if report.wrong or import_failed or no_room else 0)


if __name__ == "__main__":
    main()
