"""The figures of a comparison: values over several rounds, and what a load took of each part of the machine."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from api.client import Client
from bench.rig import Rig, Taken
from engine.control.stats import STAGES, totals
from engine.machine import cores
from engine.model import Source

__all__ = ["Load", "Spent", "Spread", "load"]

SETTLE_SECONDS: Final = 0.5
"""After this, a new engine is idle: what its workers do first has ended, even with 20 ms to the database."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure's values over several rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, digits: int = 2) -> str:
        """The median, with minimum and maximum if there was more than one round."""
        if len(self.values) == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({min(self.values):,.{digits}f}–{max(self.values):,.{digits}f})"


@dataclass(frozen=True, slots=True)
class Load:
    """A load by engines started for it: what it took, and the thread microseconds per line by stage."""

    taken: Taken
    stages: dict[str, float]


@dataclass(frozen=True, slots=True)
class Spent:
    """What a load took, to tell what it waited for.

    `cpu` is CPU seconds by program (mongod, S3 server, workers, and, if known, everything else on the machine) over
    `seconds` of wall time; `stages` is as in `Load`; `writers` is how many batches of one worker may wait for the
    database at a time.
    """

    seconds: float
    cpu: dict[str, float]
    stages: dict[str, float]
    cores: int
    writers: int

    def share(self, cpu: float) -> float:
        """CPU seconds as a share of the time of all cores."""
        return cpu / (self.cores * self.seconds)

    @classmethod
    def of(cls, loads: Sequence[Load], writers: int) -> "Spent":
        """The medians of several loads."""
        servers = {"mongod": "mongod", "S3 server": "weed"}
        cpu = {name: statistics.median(one.taken.servers[server] for one in loads) for name, server in servers.items()}
        cpu["workers"] = statistics.median(one.taken.cpu for one in loads)
        others = [one.taken.others for one in loads if one.taken.others is not None]
        if len(others) == len(loads):
            cpu["everything else"] = statistics.median(others)
        return cls(
            statistics.median(one.taken.seconds for one in loads),
            cpu,
            {stage: statistics.median(one.stages[stage] for one in loads) for stage in STAGES},
            cores(),
            writers,
        )


def load(rig: Rig, source: Source, *sizes: int, through: Client | None = None, **changes: Any) -> Load:
    """Load an object with engines started for it, one for each number of workers in `sizes`; `changes` are their
    settings. The job is submitted when they are idle, through the HTTP API if a client is given."""
    before = totals(rig.store)
    with ExitStack() as stack:
        engines = [stack.enter_context(rig.engine(size, **changes)) for size in sizes]
        time.sleep(SETTLE_SECONDS)
        taken = rig.load(source, *engines, through=through)
    after = totals(rig.store)  # engines report their last figures as they stop
    rig.check(taken.job)
    seconds = {stage: after.get(f"seconds_{stage}", 0) - before.get(f"seconds_{stage}", 0) for stage in STAGES}
    return Load(taken, {stage: 1e6 * spent / taken.lines for stage, spent in seconds.items()})
