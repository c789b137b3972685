"""Looks for the next range while the worker finishes one, so that reading does not stop for a dozen round trips."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from engine.load.run import Run

__all__ = ["Lookout"]

FRESH_SECONDS: Final = 1.0
"""How long it is believed that nothing is paused. The last batches of a range may take much longer."""


class Lookout:
    """Looks ahead in a thread of its own. There is one look at a time: its result must be taken before the next.

    Args:
        look: returns the run that it found, if any.
        paused: whether no run may begin by now.
    """

    def __init__(self, look: Callable[[], Run | None], paused: Callable[[], bool]) -> None:
        self._look = look
        self._paused = paused
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lookout")
        self._found: Future[Run | None] | None = None
        self._allowed: Future[float] | None = None  # until when the run may begin, in seconds of the monotonic clock

    def begin(self) -> None:
        """Begin a look; or, if there is one whose result has not been taken, ask whether its run may begin."""
        if self._found is None:
            self._found = self._thread.submit(self._look)
        else:
            self._allowed = self._thread.submit(self._ask)

    def ready(self) -> Run | None:
        """The run that was found, if it has not begun and is known to be allowed to; else None. Does not wait."""
        found, allowed = self._found, self._allowed
        if found is None or allowed is None or not allowed.done():  # which comes after the look
            return None
        if found.exception() or allowed.exception() or allowed.result() < time.monotonic():
            return None
        run = found.result()
        return None if run is None or not run.ahead or run.told_to_end() else run

    def _ask(self) -> float:
        asked_at = time.monotonic()
        return float("-inf") if self._paused() else asked_at + FRESH_SECONDS

    def take(self) -> Run | None:
        """Wait for the look to end and take its result; None if there was no look. Raises what the look raised."""
        found, self._found, self._allowed = self._found, None, None
        return None if found is None else found.result()

    def holds(self, job_id: str) -> Run | None:
        """The run that was found, if the look is over, the run is of this job and its lease is not lost; else None."""
        found = self._found
        if found is None or not found.done() or found.exception():
            return None
        run = found.result()
        return None if run is None or run.job.id != job_id or run.lost.is_set() else run

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown()
