"""A seeded sample: newline-delimited JSON, about 270 bytes a line; the same seed gives the same bytes."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import orjson

__all__ = ["lines", "write"]

_CITIES: Final = ("Bergen", "Graz", "Kraków", "Lyon", "Málaga", "Oulu", "Porto", "Tartu", "Utrecht", "Zürich")
_EVENTS: Final = ("view", "search", "basket", "order", "refund", "review")
_WORDS: Final = [
    "race",
    "mill",
    "wheel",
    "sluice",
    "channel",
    "weir",
    "water",
    "stone",
    "grain",
    "gate",
    "bucket",
    "shaft",
    "bearing",
    "paddle",
]


def lines(count: int, seed: int = 1) -> Iterator[bytes]:
    """`count` lines, each with its newline."""
    draw = random.Random(seed)
    for number in range(count):
        record = {
            "event": draw.choice(_EVENTS),
            "at": f"2026-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}T{draw.randint(0, 23):02}:{draw.randint(0, 59):02}:00Z",
            "user": {
                "id": draw.randint(1, 10**9),
                "name": f"user-{draw.randint(1, 10**6)}",
                "city": draw.choice(_CITIES),
            },
            "amount": round(draw.uniform(1, 500), 2),
            "items": [draw.randint(1, 9999) for _ in range(draw.randint(1, 5))],
            "paid": draw.random() < 0.7,
            "note": " ".join(draw.choices(_WORDS, k=12)),
            "number": number,
        }
        yield orjson.dumps(record) + b"\n"


def write(path: Path, count: int, seed: int = 1) -> int:
    """Write `count` lines to a file; returns its size in bytes."""
    with path.open("wb") as file:
        file.writelines(lines(count, seed))
        return file.tell()
