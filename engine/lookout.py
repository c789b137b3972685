"""Looks for the next range while the worker comes to the end of one: it takes ten round trips, in which nothing would be read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from engine.run import Run

__all__ = ["Lookout"]


class Lookout:
    """A look ahead, in a thread of its own: one at a time, and nobody else looks until what it found is taken.

    Args:
        look: returns the runs that it found.
    """

    def __init__(self, look: Callable[[], list[Run]]) -> None:
        self._look = look
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lookout")
        self._found: Future[list[Run]] | None = None

    def begin(self) -> None:
        """Look now, if nothing is left of an earlier look."""
        if self._found is None:
            self._found = self._thread.submit(self._look)

    def take(self) -> list[Run]:
        """What was found, once the look is over; nothing where there was none. Raises what it raised."""
        found, self._found = self._found, None
        return [] if found is None else found.result()

    def holds(self, job_id: str) -> list[Run]:
        """The runs of a job among what is known to be found by now, and held still."""
        found = self._found
        if found is None or not found.done() or found.exception():
            return []
        return [run for run in found.result() if run.job.id == job_id and not run.lost.is_set()]

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown()
