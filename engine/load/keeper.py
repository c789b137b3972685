"""The thread that renews the leases that a worker holds."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from engine.control.ledger import Ledger
from engine.control.rollup import RollUp
from engine.errors import HeadraceError, LeaseLost
from engine.load.run import Run
from engine.logs import get_logger
from engine.steps import Step, reach

__all__ = ["KEEPER", "STIR_SECONDS", "Keeper"]

log = get_logger()

KEEPER: Final = "keeper"
"""Name of the thread, by which the worker knows that its commands are no sign of progress."""

STIR_SECONDS: Final = 0.5
"""How often a thread that waits on purpose reports that it is alive."""

TICK_SECONDS: Final = 0.7
"""How often a lease is renewed and its progress recorded: often enough for a job's numbers to change every second."""


class Keeper(threading.Thread):
    """Renews the leases of the current runs every `TICK_SECONDS`, and learns whether their jobs are being stopped.

    It renews only while the worker makes progress: one that hangs loses its leases. Progress of any run counts for all,
    since one of several side by side may be waiting for its turn.

    Args:
        still: returns the seconds since anything moved: bytes, a batch, or a command other than this thread's.
        report: called with a run whenever its lease has been renewed, once work on it has begun.
    """

    def __init__(
        self,
        ledger: Ledger,
        rollup: RollUp,
        lease_seconds: float,
        still: Callable[[], float],
        report: Callable[[Run], None],
    ) -> None:
        super().__init__(name=KEEPER, daemon=True)
        self._ledger = ledger
        self._rollup = rollup
        self._lease_seconds = lease_seconds
        self._still = still
        self._report = report
        self._runs: tuple[Run, ...] = ()
        self._next: Run | None = None
        self._next_since = self._next_at = 0.0
        self._ticked_at = self._held_at = time.monotonic()
        self._busy = threading.Lock()
        self._changed = threading.Condition()  # guards `_runs` and `_next`; the thread of an idle worker waits on it

    def hold(self, *runs: Run) -> None:
        """Renew the leases of these runs from now on, instead of any others."""
        with self._changed:
            self._held_at = time.monotonic()
            self._runs, self._next = runs, None
            self._changed.notify()

    def hold_next(self, run: Run) -> None:
        """Also renew the lease of the next run until it becomes the current one; but only for `lease_seconds`, so that
        others get its range if the current run does not end."""
        with self._changed:
            self._next_since = self._next_at = time.monotonic()
            self._next = run
            self._changed.notify()

    def drop(self) -> None:
        """Stop renewing the current runs; on return, no tick of theirs is in progress."""
        with self._changed:
            runs, self._runs = self._runs, ()
            if self._next is not None:
                runs = (*runs, self._next)
        # The keeper's commands do not count as progress and may take long: show that this thread is alive meanwhile.
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
        """Tick the current runs and the next one, if they are due."""
        with self._busy:
            if (runs := self._runs) and time.monotonic() - self._since(runs) >= TICK_SECONDS:
                self._ticked_at = time.monotonic()
                for run in runs:
                    if self._runs is not runs:
                        break  # they have ended, and `drop` is waiting
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
        """The time from which the next tick is measured, in seconds of the monotonic clock.

        It belongs to the worker and not to a run, so that ranges of less than a second also update their job's numbers.
        Small jobs side by side restart it, since most of them end, and record everything, before a tick is due.
        """
        return max(self._ticked_at, self._held_at) if len(runs) > 1 else self._ticked_at

    def tick(self, run: Run, *, begun: bool = True) -> None:
        """Renew the lease, record progress, and learn whether the job is being stopped. After an error the next tick
        tries again."""
        if self._still() >= self._lease_seconds:
            return
        try:
            self.renew(run)
            if self._rollup.tend(run.job.id):
                run.cancelled.set()
            if begun:
                self._report(run)
        except LeaseLost:
            run.lost.set()
        except HeadraceError as error:
            log.warning("the lease could not be renewed", action="renew", job=run.job.id, cause=str(error))
        except Exception:
            # If this thread died, no lease would be renewed any more.
            log.exception("unexpected error", action="renew", job=run.job.id)

    def renew(self, run: Run) -> None:
        """Renew the lease of a run and record its mark. Raises LeaseLost."""
        asked_at = time.monotonic()
        reach(Step.CONFIRM)
        self._ledger.renew(run.lease, *run.mark())
        reach(Step.CONFIRMED)
        run.renewed_at = asked_at
