"""Looks for the next range while the worker finishes one, so that reading does not stop for a dozen round trips."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from engine.load.run import Run

__all__ = ["Lookout"]


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
        self._checked: Future[bool] | None = None

    def begin(self) -> None:
        """Begin a look; or, if there is one whose result has not been taken, ask whether its run may begin."""
        if self._found is None:
            self._found = self._thread.submit(self._look)
        else:
            self._checked = self._thread.submit(self._paused)

    def ready(self) -> Run | None:
        """The run that was found, if it has not begun and it is known by now that it may; else None. Does not wait."""
        found, checked = self._found, self._checked
        if found is None or checked is None or not checked.done():  # which comes after the look
            return None
        if found.exception() or checked.exception() or checked.result():
            return None
        run = found.result()
        return None if run is None or not run.ahead or run.told_to_end() else run

    def take(self) -> Run | None:
        """Wait for the look to end and take its result; None if there was no look. Raises what the look raised."""
        found, self._found, self._checked = self._found, None, None
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
