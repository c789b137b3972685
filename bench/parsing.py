"""Parsing beside the ceiling: `python -m bench.parsing FILE PART PARTS` parses its part of the lines with orjson.

It reads them into memory, prints a line, and begins when a line comes on its standard input. The documents are dropped
at once, and Python's garbage collector is off: no loader that parses each line with orjson takes less for it.
"""

import gc
import subprocess
import sys
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

    def end(self) -> None:
        """Wait until all have parsed their part. Raises CalledProcessError if one could not."""
        for process in self._processes:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)


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


if __name__ == "__main__":
    main()
