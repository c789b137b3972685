"""How a worker process deals with the memory that its batches give back."""

import ctypes
import gc
import time
from typing import Final

__all__ = ["Garbage", "tune"]

COLLECT_SECONDS: Final = 10.0
"""How often, at most, between two ranges, garbage that holds cycles is looked for."""

IDLE_SECONDS: Final = 300.0
"""The same for an idle worker: the driver leaves cycles each time it finds a member down."""

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3

KEPT_BLOCK_BYTES: Final = 8 * 1024 * 1024
"""A larger block of memory goes back to the kernel when it is freed: it holds a line of megabytes, of which there are few."""

KEPT_BYTES: Final = 32 * 1024 * 1024
"""Free memory above this, at the end of what has been used, goes back to the kernel."""


def tune() -> None:
    """Once in a process that is to work: let it spend less time on memory that comes and goes.

    Documents die young and hold no cycles: counting their births to look for cycles is all cost, so that from here on nothing
    does but `Garbage`, and what is there by now (the libraries) is left out of it. The allocator keeps what a batch gave back
    for the next one, up to a bound. By default it returns every large block to the kernel at once, and each page of the next
    one is faulted in and cleared anew: with records of 20 KiB that takes more time than parsing them.
    """
    gc.disable()
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; others do without
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


class Garbage:
    """What holds cycles, looked for now and then between two ranges."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._idle_at = time.monotonic() + IDLE_SECONDS
        self._done = 0

    def collect(self, done: int) -> None:
        """Collect if it is time; `done` counts what was tried so far: while it stays the same, the worker is idle."""
        now = time.monotonic()
        if now >= (self._idle_at if done == self._done else self._next_at):
            self._next_at, self._idle_at, self._done = now + COLLECT_SECONDS, now + IDLE_SECONDS, done
            gc.collect()
