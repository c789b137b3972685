"""How long the threads of this process wait for MongoDB, measured from the driver's events."""

import threading
import time
from collections.abc import Callable
from typing import Final

from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
    ConnectionCheckedOutEvent,
    ConnectionCheckOutFailedEvent,
    ConnectionCheckOutStartedEvent,
    ConnectionPoolListener,
)

__all__ = ["WINDOW_SECONDS", "RecentMinimum", "Waits"]

WINDOW_SECONDS: Final = 30.0
"""A recent minimum covers the last one to two windows of this length, since the route to a server may change."""


class _OfThread(threading.local):
    """Per thread: the seconds waited so far, when the pending command was sent, and when a connection was asked for
    (None if the thread waits for none)."""

    seconds: float = 0.0
    answer: float = 0.0
    connection: float | None = None


class RecentMinimum:
    """The shortest of the durations added recently: within the last one to two windows of `WINDOW_SECONDS`."""

    def __init__(self) -> None:
        self._seconds = self._before = float("inf")
        self._until = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Add a duration in seconds, measured at `now`, in seconds of a monotonic clock."""
        if now >= self._until:
            self._before, self._seconds, self._until = self._seconds, seconds, now + WINDOW_SECONDS
        elif seconds < self._seconds:
            self._seconds = seconds

    def seconds(self) -> float:
        """The minimum, in seconds; 0 if nothing was added."""
        shortest = min(self._seconds, self._before)
        return shortest if shortest < float("inf") else 0.0


class Waits(CommandListener, ConnectionPoolListener):
    """Adds up, per thread, the seconds spent waiting for MongoDB: for answers (without encoding, since a command is
    encoded before it is `started`), and for connections, including the handshakes of new ones.

    `moved` is called for every command and every answer as a sign of life, so that a worker waiting for a slow database
    does not count as hung. `answers` has the time of the fastest recent answer, which is close to the round-trip time
    however busy the server is.
    """

    def __init__(self, moved: Callable[[], None]) -> None:
        self._moved = moved
        self._of_thread = _OfThread()
        self.answers = RecentMinimum()

    @property
    def waited(self) -> float:
        """Seconds that this thread has waited so far."""
        return self._of_thread.seconds

    def started(self, event: CommandStartedEvent) -> None:
        self._moved()
        self._of_thread.answer = time.perf_counter()

    def succeeded(self, event: CommandSucceededEvent) -> None:
        self.answers.add(event.duration_micros / 1e6, time.monotonic())
        self._ended()

    def failed(self, event: CommandFailedEvent) -> None:
        self._ended()

    def _ended(self) -> None:
        mine = self._of_thread
        if mine.connection is None:  # else the command is part of a handshake, which is counted as a whole
            mine.seconds += time.perf_counter() - mine.answer
        self._moved()

    def connection_check_out_started(self, event: ConnectionCheckOutStartedEvent) -> None:
        self._of_thread.connection = time.perf_counter()

    def connection_checked_out(self, event: ConnectionCheckedOutEvent) -> None:
        self._connected()

    def connection_check_out_failed(self, event: ConnectionCheckOutFailedEvent) -> None:
        self._connected()

    def _connected(self) -> None:
        mine = self._of_thread
        if mine.connection is not None:
            mine.seconds += time.perf_counter() - mine.connection
            mine.connection = None

    def _pass(self, event: object) -> None:
        """Ignore events of pools, and of connections that no thread waits for."""

    pool_created = pool_ready = pool_cleared = pool_closed = _pass
    connection_created = connection_ready = connection_closed = connection_checked_in = _pass
