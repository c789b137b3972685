"""Bounds on what goes on at a time: beyond them a client is told when to come again, and costs nothing."""

import threading
import time

from api.problems import Problem
from engine.queue import Queue

__all__ = ["Depth", "Slots"]

COUNT_SECONDS = 1.0


class Slots:
    """So many at a time; `take` one and `give` it back.

    Args:
        most: how many there are.
        status: of the problem where none is left, 429 or 503.
        what: that they are, in a sentence to the client.
    """

    def __init__(self, most: int, status: int, what: str) -> None:
        self._free = threading.Semaphore(most)
        self._status = status
        self._what = f"{most} {what} at a time are under way already: come again in a little while"

    def take(self) -> None:
        """Raises Problem where none is left."""
        if not self._free.acquire(blocking=False):
            raise Problem(self._status, "busy", self._what)

    def give(self) -> None:
        """Give one back."""
        self._free.release()


class Depth:
    """Keeps the queue from growing without bound; it is counted once a second at most."""

    def __init__(self, queue: Queue, most: int) -> None:
        self._queue = queue
        self._most = most
        self._at = float("-inf")
        self._full = False

    def check(self) -> None:
        """Raises Problem where too many jobs are open."""
        if time.monotonic() - self._at > COUNT_SECONDS:
            self._full = self._queue.depth(self._most) >= self._most
            self._at = time.monotonic()
        if self._full:
            raise Problem(503, "queue_full", f"{self._most} jobs are open already: submit again when some have ended")
