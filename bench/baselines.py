"""What a load is compared with in the same round: the time the database needs, alone and with parsing beside it, and
parsing and encoding alone."""

import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

import orjson

from bench import ceiling
from bench.figures import Load
from bench.parsing import parsers
from bench.rig import ROOT, Rig

__all__ = ["CONNECTIONS", "Ceiling", "base_cpu"]

CONNECTIONS: Final = (2, 3, 4)


def base_cpu(path: Path) -> tuple[float, float]:
    """CPU seconds of only parsing and encoding the same lines, in batches of 1000 on one core.

    Returns the medians of three passes with Python's garbage collector on, and with it off.
    """
    command = [sys.executable, "-m", "bench.base", str(path)]
    found = orjson.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)
    return statistics.median(found["on"]), statistics.median(found["off"])


class Ceiling:
    """Passes of a file's records to the database over the best number of connections, which is determined once."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self._rig = rig
        self._path = path
        with path.open("rb") as file:
            self._work = ceiling.batches(file)
        self.database: list[float] = []
        self._send(max(CONNECTIONS))  # a warm-up: the first pass finds all caches cold
        walls: dict[int, list[float]] = {connections: [] for connections in CONNECTIONS}
        for connections in CONNECTIONS * 3:
            walls[connections].append(self._send(connections))
        self.connections = min(walls, key=lambda connections: statistics.median(walls[connections]))

    def seconds(self) -> float:
        """Wall seconds of one pass; appends the database's CPU seconds to `database`."""
        return self._send(self.connections)

    def with_parsing(self, parts: int) -> float:
        """Wall seconds of a pass while `parts` processes parse the same lines with orjson, and do nothing else.

        No loader that has orjson parse each line can take less on a machine whose cores are all taken.
        """
        with parsers(self._path, parts) as beside:
            began = time.monotonic()
            beside.begin()
            return max(self.seconds(), beside.end() - began)

    def _send(self, connections: int) -> float:
        name = f"c{uuid.uuid4().hex[:8]}"
        before = self._rig.servers_cpu()["mongod"]
        seconds = ceiling.send(*self._rig.primary(), self._rig.store.data.name, name, self._work, connections)
        self.database.append(self._rig.servers_cpu()["mongod"] - before)
        self._rig.store.data.drop_collection(name)
        return seconds

    def beside(self, load: Callable[[], Load]) -> tuple[float, Load]:
        """Mean wall seconds of a pass before a load and one after it, since a machine's speed drifts; and the load."""
        before = self.seconds()
        taken = load()
        return (before + self.seconds()) / 2, taken
