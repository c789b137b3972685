"""How many batches a worker sends at a time: more where the way to MongoDB takes up much of their time."""

import threading
from typing import Final

__all__ = ["MOST_TIMES", "Window"]

MOST_TIMES: Final = 2
"""So many times the number asked for is the most: each batch under way takes memory, and a thread."""

WEIGHT: Final = 1 / 16
"""Of the latest batch in the mean over those before it."""


class Window:
    """As many batches at a time as keep `writers` of them with the database: its `size`.

    By Little's law: of a batch that is waited for over `mean` seconds, the database has `mean - round_trip`; so that `writers`
    are there at any time, `writers * mean / (mean - round_trip)` must be under way.
    """

    def __init__(self, writers: int) -> None:
        self.size = self._writers = writers
        self._mean = 0.0
        self._lock = threading.Lock()

    def fit(self, waited: float, round_trip: float) -> None:
        """A batch was waited for so long, in seconds, of which the way took `round_trip`."""
        with self._lock:
            self._mean += (waited - self._mean) * (WEIGHT if self._mean else 1)
            way = min(round_trip, self._mean * (1 - 1 / MOST_TIMES))
            self.size = round(self._writers * self._mean / (self._mean - way)) if way else self._writers
