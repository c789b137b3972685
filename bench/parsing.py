"""Parsing beside the ceiling: `python -m bench.parsing FILE PART PARTS` parses its part of the lines with orjson.

It reads them into memory, prints a line, begins when a line comes on its standard input, and prints when it has ended.
The documents are dropped at once, and Python's garbage collector is off: no loader that parses each line with orjson
takes less for it.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import orjson

from bench.rig import ROOT

__all__ = ["Parsers", "parsers"]


class Parsers:
    """Processes that have read their part of a file, and wait."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def begin(self) -> None:
        """Let all of them parse."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def end(self) -> float:
        """Wait until all have parsed their part; returns when the last of them had, by `time.monotonic`.

        Raises CalledProcessError if one could not.
        """
        ended = []
        for process in self._processes:
            assert process.stdout is not None
            told = process.stdout.readline()
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)
            ended.append(float(told))
        return max(ended)


@contextmanager
def parsers(path: Path, parts: int) -> Iterator[Parsers]:
    """`parts` processes that are ready to parse the lines of a file."""
    with ExitStack() as ended:
        processes = []
        for part in range(parts):
            command = [sys.executable, "-m", "bench.parsing", str(path), str(part), str(parts)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            ended.enter_context(process)
            ended.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield Parsers(processes)


def main() -> None:
    """Parse the lines of which this part is told, once it is told to begin."""
    path, part, parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with path.open("rb") as file:
        lines = list(islice(file, part, None, parts))
    gc.disable()
    print("ready", flush=True)
    sys.stdin.readline()
    for line in lines:
        orjson.loads(line)
    print(time.monotonic(), flush=True)  # one clock for all processes; the end of this one takes a while


if __name__ == "__main__":
    main()
