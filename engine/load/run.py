"""A lease that is being worked on. No I/O: it only holds what its threads share."""

import threading
import time
from collections.abc import Callable

from engine.load.watermark import Watermark
from engine.model import Job, Lease, Tally
from engine.text.batches import Batch

__all__ = ["Run"]


class Run:
    """The state that the threads at work on one lease share.

    `move()` is called whenever bytes or batches move. `stop`: the worker is to stop. `cancelled`: the job is being
    stopped, or the run is not to begin. `lost`: the lease is no longer this worker's. `failed`: a read or another batch
    of this run has failed. `cautious`: earlier holders died at this offset. `renewed_at`: when the last renewal began,
    or the run if there was none, in seconds of the monotonic clock. `head`: the first bytes of the object, if already
    read. `ahead`: the lease was taken while the worker was still working on another range, and has not begun.
    """

    def __init__(
        self,
        job: Job,
        lease: Lease,
        stop: threading.Event,
        moved: Callable[[], None],
        head: bytes = b"",
        *,
        ahead: bool = False,
    ) -> None:
        self.job = job
        self.head = head
        self.ahead = ahead
        self.lease = lease
        self.stop = stop
        self.lost = threading.Event()
        self.cancelled = threading.Event()
        self.failed = threading.Event()
        self.cautious = lease.deaths > 0
        self.renewed_at = time.monotonic()
        self.move = moved
        self._lock = threading.Lock()
        self._mark = Watermark(lease.confirmed, lease.tally)

    def opened(self, batch: Batch) -> Callable[[Tally], None]:
        """Record that a batch is in flight; returns a function to call with its tally once it is acknowledged."""
        with self._lock:
            slot = self._mark.open(batch.end)

        def close(tally: Tally) -> None:
            with self._lock:
                self._mark.close(slot, tally)

        return close

    def told_to_end(self) -> bool:
        """Whether nothing more is to be read."""
        return self.stop.is_set() or self.cancelled.is_set() or self.lost.is_set()

    def mark(self) -> tuple[int, Tally]:
        """The confirmed offset, and the tally up to there."""
        with self._lock:
            return self._mark.confirmed, self._mark.tally
