"""A few bytes that a worker shares with its supervisor: when it last moved, and how far its start has come.

They are mapped before the fork. No lock is needed: each field is written by a single store instruction, so that it is
never read half written. That rules out `struct.pack_into`, which writes zeros first: a supervisor that read them would
see a worker that has not moved since the machine booted, and kill it.
"""

import mmap
import time
from typing import Final

__all__ = ["Heartbeat"]

_BOOTED: Final = 8
_RELEASED: Final = 9


class Heartbeat:
    """Shared between one worker and its supervisor. Times are seconds of the system's monotonic clock."""

    __slots__ = ("_clock", "_memory")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._clock = memoryview(self._memory)[:_BOOTED].cast("d")
        self.touch()

    def touch(self) -> None:
        """Record that the worker has moved just now."""
        self._clock[0] = time.monotonic()

    def age(self) -> float:
        """Seconds since the worker last moved."""
        return time.monotonic() - self._clock[0]

    def mark_booted(self) -> None:
        """Record that the worker has reached MongoDB."""
        self._memory[_BOOTED] = 1

    def booted(self) -> bool:
        """Whether the worker has reached MongoDB."""
        return self._memory[_BOOTED] == 1

    def mark_released(self) -> None:
        """Record that the predecessors' leases have been freed."""
        self._memory[_RELEASED] = 1

    def released(self) -> bool:
        """Whether the predecessors' leases have been freed."""
        return self._memory[_RELEASED] == 1

    def close(self) -> None:
        """Release the memory; for the supervisor, once the worker is gone."""
        self._clock.release()
        self._memory.close()
