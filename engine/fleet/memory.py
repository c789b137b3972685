"""Memory of a worker process, whose batches come and go: garbage collection, and what the allocator keeps."""

import ctypes
import gc
import time
from typing import Final

__all__ = ["Garbage", "tune"]

COLLECT_SECONDS: Final = 10.0
"""The shortest time between two garbage collections of a busy worker; they run between ranges."""

IDLE_SECONDS: Final = 300.0
"""The shortest time between two collections of an idle worker: the driver leaves cycles when it finds a member down."""

# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8

KEPT_BLOCK_BYTES: Final = 8 * 1024 * 1024
"""Larger blocks of memory go back to the kernel when they are freed: they hold very long lines, which are rare."""

KEPT_BYTES: Final = 32 * 1024 * 1024
"""Free memory at the top of the heap goes back to the kernel when there is more of it than this."""

HEAPS: Final = 2
"""Heaps that the threads share. By default each gets its own, with free memory that the others cannot use. Few threads wait
for each other here, since one at a time has the interpreter."""


def tune() -> None:
    """Spend less time on short-lived memory; called once, when a worker process starts.

    Documents die young and hold no cycles, so automatic garbage collection is pure cost: from here on only `Garbage`
    collects. The allocator keeps the memory of one batch for the next, up to a bound. By default it returns every large
    block to the kernel at once, and each page of the next one is faulted in and zeroed again: with records of 20 KiB,
    that takes more time than parsing them.
    """
    gc.disable()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other libraries keep their defaults
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_ARENA_MAX, HEAPS)


class Garbage:
    """Collects cyclic garbage now and then, between two ranges."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._next_at, self._idle_at, self._done = now + COLLECT_SECONDS, now + IDLE_SECONDS, 0

    @staticmethod
    def exempt() -> None:
        """Look no more at objects that exist by now, once all libraries are loaded and all clients made."""
        gc.freeze()

    def collect(self, done: int) -> None:
        """Collect if it is time; `done` counts what was tried so far: while it does not change, the worker is idle."""
        now = time.monotonic()
        if now >= (self._idle_at if done == self._done else self._next_at):
            self._next_at, self._idle_at, self._done = now + COLLECT_SECONDS, now + IDLE_SECONDS, done
            gc.collect()
