"""How often, and after what pauses, something is tried again while a lease is worked on."""

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
"""How often a read or write is tried, without progress between, before its range goes back."""

BACKOFF_SECONDS: Final = 0.2
"""The first wait between tries; each further one is twice as long, give or take a half."""


def insist(run: Run, speak: Callable[[], T]) -> T:
    """Call `speak`, which must be safe to repeat, until it succeeds, `TRIES` times at most; raises what the last try raised. It
    mostly records how a lease ended: unrecorded, the range would stand still until the lease runs out."""
    for tries in range(1, TRIES):
        try:
            return speak()
        except Transient:
            back_off(run, tries)
    return speak()


def back_off(run: Run, tries: int) -> float:
    """Wait before the next try, less when the worker is to stop; returns the seconds that it took."""
    began = time.monotonic()
    end = began + BACKOFF_SECONDS * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
    while (left := end - time.monotonic()) > 0:
        run.move()  # it does not hang
        if run.stop.wait(min(left, STIR_SECONDS)):
            break
    return time.monotonic() - began
