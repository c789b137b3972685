"""Seeded records of several shapes: the lines that the benchmarks load. Lengths are bytes, including the newline."""

import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import orjson

from engine.local import sample

__all__ = ["FULL_RECORDS", "QUICK_RECORDS", "SHAPES", "write"]

FULL_RECORDS: Final = {"ordinary": 1_000_000, "tiny": 1_000_000, "wide": 60_000, "large": 20_000}
QUICK_RECORDS: Final = {"ordinary": 100_000, "tiny": 450_000, "wide": 6000, "large": 2000}
"""Records of the files that are loaded end to end, by shape: more than 8 MiB, so that even the quick ones are cut into enough
ranges for two processes."""


def _large(count: int) -> Iterator[bytes]:
    draw = random.Random(2)
    words = ["".join(draw.choices(string.ascii_lowercase, k=8)) for _ in range(500)]
    for number in range(count):
        yield orjson.dumps({"n": number, "body": " ".join(draw.choices(words, k=2260))}) + b"\n"


def _wide(count: int) -> Iterator[bytes]:
    draw = random.Random(3)
    for number in range(count):
        fields = {
            f"field_{i:03}": draw.choice([draw.randint(0, 10**6), draw.random(), "value", True]) for i in range(299)
        }
        yield orjson.dumps({"n": number} | fields) + b"\n"


def _tiny(count: int) -> Iterator[bytes]:
    draw = random.Random(4)
    for number in range(count):
        yield b'{"n":%d,"v":%d,"ok":true}\n' % (number + 10**7, draw.randint(10**6, 10**7))


SHAPES: Final[dict[str, Callable[[int], Iterator[bytes]]]] = {
    "ordinary": sample.lines,  # about 260 bytes
    "large": _large,  # about 20.4 KB
    "wide": _wide,  # 300 fields, about 6.5 KB
    "tiny": _tiny,  # 37 bytes each, for up to 90 million records
}


def write(path: Path, shape: str, count: int) -> int:
    """Write `count` records of a shape; returns the file's size in bytes."""
    with path.open("wb") as file:
        file.writelines(SHAPES[shape](count))
        return file.tell()
