"""The cost of parsing and encoding alone: `python -m bench.base FILE` prints the CPU seconds of each pass, as JSON.

It runs in a process of its own: Python's garbage collector would scan the objects of anything else again and again.
"""

import gc
import sys
import time
from itertools import islice
from pathlib import Path

import bson
import orjson

RECORDS = 1000
PASSES = 3


def one_pass(path: Path) -> float:
    """CPU seconds of `bson.encode({"documents": [orjson.loads(line) ...]})`, 1000 lines at a time, excluding reads."""
    spent = 0.0
    with path.open("rb") as file:
        while lines := list(islice(file, RECORDS)):
            began = time.process_time()
            bson.encode({"documents": [orjson.loads(line) for line in lines]})
            spent += time.process_time() - began
    return spent


def main() -> None:
    """Print three passes as Python runs them, and three with the garbage collector off."""
    found = {"on": [one_pass(Path(sys.argv[1])) for _ in range(PASSES)]}
    gc.disable()
    found["off"] = [one_pass(Path(sys.argv[1])) for _ in range(PASSES)]
    print(orjson.dumps(found).decode())


if __name__ == "__main__":
    main()
