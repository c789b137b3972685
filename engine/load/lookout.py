"""Looks for the next range while the worker comes to the end of one: it takes ten round trips, in which nothing would be read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from engine.load.run import Run

__all__ = ["Lookout"]


class Lookout:
    """A look ahead, in a thread of its own: one at a time, and nobody else looks until what it found is taken.

    Args:
        look: returns the run that it found, if any.
    """

    def __init__(self, look: Callable[[], Run | None]) -> None:
        self._look = look
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lookout")
        self._found: Future[Run | None] | None = None

    def begin(self) -> None:
        """Look now, if nothing is left of an earlier look."""
        if self._found is None:
            self._found = self._thread.submit(self._look)

    def take(self) -> Run | None:
        """What was found, once the look is over; None where there was no look. Raises what it raised."""
        found, self._found = self._found, None
        return None if found is None else found.result()

    def holds(self, job_id: str) -> Run | None:
        """What was found, where that is known by now, is of this job, and is held still."""
        found = self._found
        if found is None or not found.done() or found.exception():
            return None
        run = found.result()
        return None if run is None or run.job.id != job_id or run.lost.is_set() else run

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown()
