"""What parsing and encoding cost by themselves: `python -m bench.base FILE` prints the CPU seconds of each pass, as JSON.

In a process that has nothing else in it: what others hold is what Python's garbage collector looks at again and again.
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
    """CPU seconds of `bson.encode({"documents": [orjson.loads(line) ...]})` over the lines, 1000 at a time, without reading."""
    spent = 0.0
    with path.open("rb") as file:
        while lines := list(islice(file, RECORDS)):
            began = time.process_time()
            bson.encode({"documents": [orjson.loads(line) for line in lines]})
            spent += time.process_time() - began
    return spent


def main() -> None:
    """Three passes as Python runs them, and three with the garbage collector off."""
    found = {"on": [one_pass(Path(sys.argv[1])) for _ in range(PASSES)]}
    gc.disable()
    found["off"] = [one_pass(Path(sys.argv[1])) for _ in range(PASSES)]
    print(orjson.dumps(found).decode())


if __name__ == "__main__":
    main()
