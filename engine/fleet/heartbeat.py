"""A few bytes that a worker shares with its supervisor: when it last moved, whether it has booted, what it has freed.

Made before the fork. No lock: each field is written by one store of the processor, so that nobody reads one half written. That
rules out `struct.pack_into`, which fills with zeros first: a supervisor that looked just then would see a worker that had
not moved since the machine was started, and kill it.
"""

import mmap
import time
from typing import Final

__all__ = ["Heartbeat"]

_BOOTED: Final = 8
_RELEASED: Final = 9


class Heartbeat:
    """Shared between one worker and its supervisor. Times are of the system's monotonic clock, seconds."""

    __slots__ = ("_clock", "_memory")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._clock = memoryview(self._memory)[:_BOOTED].cast("d")
        self.touch()

    def touch(self) -> None:
        """The worker: I have moved."""
        self._clock[0] = time.monotonic()

    def age(self) -> float:
        """Seconds since the worker last moved."""
        return time.monotonic() - self._clock[0]

    def mark_booted(self) -> None:
        """The worker: I have reached the servers."""
        self._memory[_BOOTED] = 1

    def booted(self) -> bool:
        """Whether the worker has reached the servers."""
        return self._memory[_BOOTED] == 1

    def mark_released(self) -> None:
        """The worker: what my predecessors held is free."""
        self._memory[_RELEASED] = 1

    def released(self) -> bool:
        """Whether the predecessors' leases are free."""
        return self._memory[_RELEASED] == 1

    def close(self) -> None:
        """The supervisor, when the worker is gone."""
        self._clock.release()
        self._memory.close()
