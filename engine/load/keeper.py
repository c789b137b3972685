"""The thread that renews the leases at hand.

It renews only while the worker moves, and learns on the way whether the jobs are being stopped.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.errors import HeadraceError, LeaseLost
from engine.load.run import Run
from engine.logs import get_logger
from engine.steps import Step, reach

__all__ = ["KEEPER", "STIR_SECONDS", "Keeper"]

log = get_logger()

KEEPER: Final = "keeper"
"""Name of the thread that renews."""

STIR_SECONDS: Final = 0.5
"""How often a thread that waits on purpose reports that it is alive."""

TICK_SECONDS: Final = 0.7
"""How often a lease is renewed and its progress recorded: so often that the numbers of a job move every second."""


class Keeper(threading.Thread):
    """Renews the leases of the runs at hand, every `TICK_SECONDS`, and learns whether their jobs are being stopped.

    It renews only while the worker moves: one that hangs loses its leases. One run among several side by side need not move: it
    may be waiting for its turn.

    Args:
        still: tells for how many seconds nothing has moved: no bytes, no batch, no command but those of this thread.
    """

    def __init__(
        self,
        ledger: Ledger,
        queue: Queue,
        lease_seconds: float,
        still: Callable[[], float],
        report: Callable[[Run], None],
    ) -> None:
        super().__init__(name=KEEPER, daemon=True)
        self._ledger = ledger
        self._queue = queue
        self._lease_seconds = lease_seconds
        self._still = still
        self._report = report
        self._runs: tuple[Run, ...] = ()
        self._next: Run | None = None
        self._next_since = self._next_at = 0.0
        self._ticked_at = self._held_at = time.monotonic()
        self._busy = threading.Lock()
        self._changed = threading.Condition()  # for `_runs` and `_next`: the thread of an idle worker sleeps

    def hold(self, *runs: Run) -> None:
        """Keep the leases of these runs from now on."""
        with self._changed:
            self._held_at = time.monotonic()
            self._runs, self._next = runs, None
            self._changed.notify()

    def hold_next(self, run: Run) -> None:
        """Keep the lease of the run that comes next, too, until it is held itself; but no longer than a lease lasts, since it may
        be free for others where the present one does not come to its end."""
        with self._changed:
            self._next_since = self._next_at = time.monotonic()
            self._next = run
            self._changed.notify()

    def drop(self) -> None:
        """Let go of what is held; when it returns, no tick of a run is under way."""
        with self._changed:
            runs, self._runs = self._runs, ()
            if self._next is not None:
                runs = (*runs, self._next)
        # Its commands are no movement, and may take long: who waits for them lives all the same.
        while not self._busy.acquire(timeout=STIR_SECONDS):
            for run in runs:
                run.move()
        self._busy.release()

    def run(self) -> None:
        """The thread's loop."""
        while True:
            with self._changed:
                self._changed.wait_for(self.holds_any)
            time.sleep(TICK_SECONDS / 7)
            self.turn()

    def holds_any(self) -> bool:
        """Whether there is a lease to renew."""
        return bool(self._runs) or self._next is not None

    def turn(self) -> None:
        """Tick the runs at hand, where it is time for that."""
        with self._busy:
            if (runs := self._runs) and time.monotonic() - self._since(runs) >= TICK_SECONDS:
                self._ticked_at = time.monotonic()
                for run in runs:
                    if self._runs is not runs:
                        break  # they have ended, and somebody waits
                    self.tick(run)
            if (ahead := self._next) and self._runs is runs:
                self._turn_next(ahead)

    def _turn_next(self, run: Run) -> None:
        now = time.monotonic()
        if run.told_to_end() or now - self._next_since >= self._lease_seconds:
            with self._changed:
                if self._next is run:
                    self._next = None
        elif now - self._next_at >= TICK_SECONDS:
            self._next_at = now
            self.tick(run, begun=False)

    def _since(self, runs: Sequence[Run]) -> float:
        """From when on the time to the next tick counts.

        The clock is the worker's and not the run's: ranges of less than a second must move the numbers of their job, too.
        Small jobs side by side have told all by their end, which mostly is nearer than a tick.
        """
        return max(self._ticked_at, self._held_at) if len(runs) > 1 else self._ticked_at

    def tick(self, run: Run, *, begun: bool = True) -> None:
        """Renew, record progress, look at the signals of the job. Errors that pass are left to the next tick."""
        if self._still() >= self._lease_seconds:
            return
        try:
            self.renew(run)
            signals = self._queue.signals(run.job.id)
            if signals.overdue and not signals.stopping:
                self._queue.stop_overdue()
            if signals.stopping or signals.overdue:
                run.cancelled.set()
            elif signals.stale:
                self._queue.roll_up(run.job.id)
            if begun:
                self._report(run)
        except LeaseLost:
            run.lost.set()
        except HeadraceError as error:
            log.warning("the lease could not be renewed", action="renew", job=run.job.id, cause=str(error))
        except Exception:
            # A thread that ends here would leave every lease from now on to itself.
            log.exception("unexpected error", action="renew", job=run.job.id)

    def renew(self, run: Run) -> None:
        """Renew the lease of a run at its mark. Raises LeaseLost."""
        asked_at = time.monotonic()
        reach(Step.CONFIRM)
        self._ledger.renew(run.lease, *run.mark())
        reach(Step.CONFIRMED)
        run.renewed_at = asked_at
