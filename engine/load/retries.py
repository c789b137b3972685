"""Retries and backoff while a lease is worked on."""

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from engine.errors import Transient
from engine.load.keeper import STIR_SECONDS
from engine.load.run import Run

__all__ = ["TRIES", "back_off", "insist"]

T = TypeVar("T")

TRIES: Final = 6
"""How many times a read or write is tried without progress before its range is put off."""

BACKOFF_SECONDS: Final = 0.2
"""The first wait between tries, doubled for each further one; jitter makes each up to half longer or shorter."""


def insist(run: Run, speak: Callable[[], T]) -> T:
    """Call `speak`, which must be safe to repeat, until it succeeds, at most `TRIES` times; raises what the last try
    raised. Most calls record how a lease ended: without that, the range would be stuck until the lease runs out."""
    for tries in range(1, TRIES):
        try:
            return speak()
        except Transient:
            back_off(run, tries)
    return speak()


def back_off(run: Run, tries: int) -> float:
    """Wait before the next try, or until the worker is to stop; returns the seconds waited."""
    began = time.monotonic()
    end = began + BACKOFF_SECONDS * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
    while (left := end - time.monotonic()) > 0:
        run.move()  # a sign of life: it waits on purpose
        if run.stop.wait(min(left, STIR_SECONDS)):
            break
    return time.monotonic() - began
