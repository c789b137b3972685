"""How many batches a worker keeps in flight: more if the round trip to MongoDB takes up much of their time."""

import threading
from typing import Final

__all__ = ["MOST_TIMES", "Window"]

MOST_TIMES: Final = 2
"""The window is at most this multiple of the requested number: each batch in flight takes memory and a thread."""

WEIGHT: Final = 1 / 16
"""Weight of the latest batch in the exponential moving average."""


class Window:
    """Its `size` is the number of batches in flight that keeps `writers` of them at the database.

    By Little's law: of the `mean` seconds that a batch is waited for, it spends `mean - round_trip` at the database; to
    have `writers` there at any time, `writers * mean / (mean - round_trip)` must be in flight.
    """

    def __init__(self, writers: int) -> None:
        self.size = self._writers = writers
        self._mean = 0.0
        self._lock = threading.Lock()

    def fit(self, waited: float, round_trip: float) -> None:
        """Adjust the size: a batch was waited for `waited` seconds, of which the round trip took `round_trip`."""
        with self._lock:
            self._mean += (waited - self._mean) * (WEIGHT if self._mean else 1)
            way = min(round_trip, self._mean * (1 - 1 / MOST_TIMES))
            self.size = round(self._writers * self._mean / (self._mean - way)) if way else self._writers
