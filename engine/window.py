"""How many batches a worker sends at a time: more where the way to MongoDB takes up much of their time."""

import threading
from typing import Final

__all__ = ["MOST_TIMES", "Window"]

MOST_TIMES: Final = 2
"""So many times the number asked for is the most: each batch under way takes memory, and a thread."""

WEIGHT: Final = 1 / 16
"""Of the latest batch in the mean over those before it."""


class Window:
    """Lets as many batches through at a time as keep `writers` of them with the database.

    By Little's law: of a batch that is waited for over `mean` seconds, the database has `mean - round_trip`; so that `writers`
    are there at any time, `writers * mean / (mean - round_trip)` must be under way. A context manager, around each batch.
    """

    def __init__(self, writers: int) -> None:
        self.size = self._writers = writers
        self._mean = 0.0
        self._inside = 0
        self._turn = threading.Condition()

    def __enter__(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._inside < self.size)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._inside -= 1
            self._turn.notify()

    def fit(self, waited: float, round_trip: float) -> None:
        """A batch was waited for so long, in seconds, of which the way took `round_trip`."""
        with self._turn:
            self._mean += (waited - self._mean) * (WEIGHT if self._mean else 1)
            way = min(round_trip, self._mean * (1 - 1 / MOST_TIMES))
            self.size = round(self._writers * self._mean / (self._mean - way)) if way else self._writers
            self._turn.notify()
