"""A lease from its start to its end: batches, bulk writes, confirmation.

It knows nothing of processes. The calling thread reads and splits; a few writer threads decode and write one batch
each, so that neither S3's nor MongoDB's latency stalls the other; a keeper thread renews the lease meanwhile.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from enum import Enum, auto
from typing import Final

from engine.control.ledger import Ledger
from engine.control.rejects import Rejects
from engine.control.rollup import RollUp
from engine.control.stats import Stats
from engine.control.store import Store
from engine.errors import HeadraceError, LeaseLost, Severed, Transient
from engine.load.dryrun import DryRun
from engine.load.keeper import Keeper
from engine.load.reading import Reading
from engine.load.retries import TRIES, back_off, insist
from engine.load.run import Run
from engine.load.sink import Sink
from engine.load.window import MOST_TIMES, Window
from engine.logs import get_logger, unexpected_translated
from engine.model import Tally
from engine.s3.objects import Objects
from engine.settings import Settings
from engine.steps import Step, reach
from engine.text.batches import Batch, Batcher
from engine.text.decode import decode
from engine.text.lines import Splitter

__all__ = ["Ended", "Pipeline"]

log = get_logger()

AHEAD_SECONDS: Final = 0.2
"""The search for the next range begins at least this long before the end of the current one. Kept short, since a range
that is leased ahead is not available to an idle worker."""

AHEAD_ROUND_TRIPS: Final = 24
"""The search also begins at least this many round trips to MongoDB before the end of a range. It takes about twelve, and
each takes longer than the fastest, by which they are measured."""

CAUTIOUS_LINES: Final = 50
"""Lines in the first batch of a range whose earlier holders died. Each batch is confirmed before the next, twice as
large, begins, so that a few deaths narrow down the lines that kill workers."""


class Ended(Enum):
    """How the work on a lease ended, unless with an error."""

    DONE = auto()
    STOPPED = auto()  # the worker was told to stop; the range was given back
    CANCELLED = auto()  # the job is being stopped; the range was given back


_InFlight = deque[tuple[Future[None], int]]
"""Batches in flight in file order, each with its weight in bytes, since batches of very long lines must not add up."""


class Pipeline:
    """Works on leases until they end: one at a time, or several of small objects side by side.

    Args:
        store, objects, ledger, rollup, rejects, stats: the databases, S3, and what is recorded.
        still, report: as for `Keeper`.
        near_end: called near the end of a range that is worked on, and again when all of it has been read.
        following: returns the run that may begin, if one is known, now that the current one is done.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        objects: Objects,
        ledger: Ledger,
        rollup: RollUp,
        rejects: Rejects,
        stats: Stats,
        *,
        still: Callable[[], float],
        report: Callable[[Run], None] = lambda run: None,
        near_end: Callable[[], None] = lambda: None,
        following: Callable[[], Run | None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._reading = Reading(objects, stats, settings.engine_read_bytes)
        self._ledger = ledger
        self._rejects = rejects
        self._stats = stats
        self._near_end = near_end
        self._following = following
        self.keeper = Keeper(ledger, rollup, settings.engine_lease_seconds, still, report)
        self.keeper.start()
        self._window = Window(settings.engine_writers)
        self._writers = ThreadPoolExecutor(settings.engine_writers, thread_name_prefix="writer")
        # A separate pool, whose threads start only if MongoDB is far away: each takes memory and CPU cache.
        self._extra_writers = ThreadPoolExecutor(
            (MOST_TIMES - 1) * settings.engine_writers, thread_name_prefix="extra-writer"
        )

    def close(self) -> None:
        """Stop renewing leases, and let the writer threads end."""
        self.keeper.drop()
        self._reading.close()
        for pool in (self._writers, self._extra_writers):
            pool.shutdown(wait=False, cancel_futures=True)

    def expect(self, run: Run) -> None:
        """While another run is being worked on: renew the lease of the next one, and ask for its first bytes."""
        self.keeper.hold_next(run)
        self._reading.request(run)

    def forget(self, run: Run) -> None:
        """The next run will not begin after all, and its lease is left to be freed: drop what was asked for ahead."""
        self._reading.forget(run)

    def run(self, run: Run) -> Ended:
        """Work on a lease until its range is done or given back.

        Raises:
            LeaseLost: somebody else owns the range; nothing more was written.
            Transient: the range was put off, and will be leased again later.
            Permanent: the job cannot continue; the range was given back.
        """
        self.keeper.hold(run)
        try:
            with unexpected_translated(f"working on range {run.lease.range.index}"):
                ended = self._begin_and_work(run)
        except HeadraceError as error:
            self.keeper.drop()
            self._hand_back(run, error)
            raise
        finally:
            self.keeper.drop()
        if ended is Ended.DONE:
            reach(Step.CLOSE)
            self._close(run)
            reach(Step.CLOSED)
        else:
            self._hand_back(run)
        return ended

    def _close(self, run: Run) -> None:
        """Close the range of a run. If the following run may begin by now, it does, with the same command: each command
        waits for a round trip and for the database's journal."""
        lease, tally = run.lease, run.mark()[1]

        def close() -> None:
            following = self._following()
            if following is not None and self._ledger.close_all([(lease, tally)], following.lease):
                following.ahead = False
            else:  # or one of the two leases was lost: the commands for one lease tell which
                self._ledger.close(lease, tally)

        insist(run, close)

    def _begin_and_work(self, run: Run) -> Ended:
        try:
            if run.told_to_end():
                return _ended_early(run)
            if run.ahead:
                insist(run, lambda: self._ledger.begin(run.lease))
            if run.lease.resumed:
                insist(run, lambda: self._rejects.forget(run.lease))
            return self._work_in_turn(run) if run.cautious else self._work(run)
        finally:
            self.forget(run)

    def run_together(self, runs: Sequence[Run]) -> tuple[list[tuple[Run, Ended | HeadraceError]], bool]:
        """Work side by side on leases of small objects, whose bytes have been read already.

        Returns how each ended, and whether all that are DONE were closed; False means that a lease was lost meanwhile.
        """
        self.keeper.hold(*runs)
        futures = [self._writers.submit(self._work_alone, run) for run in runs]
        wait(futures)
        self.keeper.drop()
        outcomes = [(run, future.result()) for run, future in zip(runs, futures, strict=True)]
        done = [run for run, outcome in outcomes if outcome is Ended.DONE]
        closed = True
        if done:
            reach(Step.CLOSE)
            closed = insist(done[0], lambda: self._ledger.close_all([(run.lease, run.mark()[1]) for run in done]))
            reach(Step.CLOSED)
        results: list[tuple[Run, Ended | HeadraceError]] = []
        for run, outcome in outcomes:
            try:
                if outcome is not Ended.DONE:
                    self._hand_back(run, outcome if isinstance(outcome, HeadraceError) else None)
            except HeadraceError as error:
                results.append((run, error))
            else:
                results.append((run, outcome))
        return results, closed

    def _hand_back(self, run: Run, error: HeadraceError | None = None) -> None:
        """Tell the ledger that a lease ended before its range did, and why."""
        if isinstance(error, LeaseLost):
            return
        if isinstance(error, Transient):
            failure, spend = error.failure(), error.spends
            insist(run, lambda: self._ledger.postpone(run.lease, *run.mark(), failure, spend=spend))
        else:
            insist(run, lambda: self._ledger.give_back(run.lease, *run.mark()))

    def _work_alone(self, run: Run) -> Ended | HeadraceError:
        """Work on the lease of a small object in this thread; returns an error instead of raising it."""
        try:
            with unexpected_translated(f"working on range {run.lease.range.index}"):
                return self._work_in_turn(run)
        except HeadraceError as error:
            return error

    def _begin(self, run: Run) -> tuple[Sink, Splitter, Batcher]:
        """The sink, splitter and batcher of a run."""
        lease, job = run.lease, run.job
        assert job.plan is not None
        given = (self._store, job.options.collection, job.plan, self._settings.write_timeout_seconds)
        return (
            DryRun(*given, job.id) if job.options.validate else Sink(*given),
            Splitter(lease.confirmed, lease.range.end, job.plan.max_line_bytes),
            Batcher(self._settings.engine_batch_records, self._settings.engine_batch_bytes, lease.tally.lines),
        )

    def _work_in_turn(self, run: Run) -> Ended:
        """Write one batch after the other, in this thread."""
        sink, splitter, batcher = self._begin(run)
        most = batcher.max_lines
        if run.cautious:
            batcher.max_lines = min(CAUTIOUS_LINES, most)
        with closing(self._reading.batches(run, splitter, batcher)) as batches:
            for batch in batches:
                if run.stop.is_set() or run.cancelled.is_set():
                    return _ended_early(run)
                self._write(run, sink, batch, run.opened(batch))
                if run.cautious:
                    insist(run, lambda: self.keeper.renew(run))
                    batcher.max_lines = min(2 * batcher.max_lines, most)
        return Ended.DONE if splitter.done else _ended_early(run)

    def _work(self, run: Run) -> Ended:
        """Write batches in the writer threads, as many at a time as the window allows."""
        settings = self._settings
        sink, splitter, batcher = self._begin(run)
        in_flight: _InFlight = deque()
        room = (settings.engine_writers + 1) * settings.engine_batch_bytes  # bytes in flight, whatever their number
        exhausted = looked = False
        started = time.monotonic()
        try:
            with closing(self._reading.batches(run, splitter, batcher)) as batches:
                for batch in batches:
                    if run.stop.is_set() or run.cancelled.is_set():
                        break
                    weight = batch.weight
                    began = time.perf_counter()
                    _make_room(in_flight, self._window.size + 1, room - weight)
                    self._stats.add(seconds_stall=time.perf_counter() - began)
                    closed = run.opened(batch)
                    unfinished = sum(not future.done() for future, _ in in_flight)
                    pool = self._writers if unfinished <= settings.engine_writers else self._extra_writers
                    future = pool.submit(self._write, run, sink, batch, closed)
                    in_flight.append((future, weight))
                    if not looked and self._seconds_left(run, started) <= self._ahead_seconds():
                        looked = True
                        self._near_end()
                else:
                    exhausted = splitter.done
            if exhausted:
                self._near_end()
            # Counted apart from the stalls above: until the last batch is written, this thread reads nothing.
            began = time.perf_counter()
            _make_room(in_flight, 1)
            self._stats.add(seconds_drain=time.perf_counter() - began)
        except BaseException:
            run.failed.set()
            # Batches in flight may still be written, which does no harm: wait, so that the mark covers them.
            for future, _ in in_flight:
                future.cancel() or future.exception()
            raise
        return Ended.DONE if exhausted else _ended_early(run)

    def _seconds_left(self, run: Run, started: float) -> float:
        """Seconds that the rest of a range takes at its pace so far; infinite until something is acknowledged."""
        lease, (confirmed, _) = run.lease, run.mark()
        if confirmed == lease.confirmed:
            return float("inf")
        return (lease.range.end - confirmed) * (time.monotonic() - started) / (confirmed - lease.confirmed)

    def _ahead_seconds(self) -> float:
        """How many seconds before the end of a range the search for the next one begins."""
        return max(AHEAD_SECONDS, AHEAD_ROUND_TRIPS * self._store.round_trip())

    def _write(self, run: Run, sink: Sink, batch: Batch, close: Callable[[Tally], None]) -> None:
        """Decode one batch, write its documents and rejects, and close it with its tally."""
        job, plan = run.job, run.job.plan
        assert plan is not None
        began, waited, backed_off = time.perf_counter(), self._store.waited(), 0.0
        documents = decode(batch, plan.format, plan.tag, job.source.key)
        if documents.any():
            reach(Step.PARSED)
        at_a_time, severed = None, 0  # connections severed in a row
        for tries in range(1, TRIES + 1):
            try:
                self._guard(run)
                run.move()
                tally, rejects = sink.write(documents, at_a_time, lambda: self._guard(run))
                reach(Step.WRITTEN)
                if rejects:
                    self._guard(run)
                    self._rejects.write(job, run.lease, rejects)
                    reach(Step.REJECTED)
                break
            except Transient as error:
                self._stats.add(retries=1)
                if tries == TRIES or run.failed.is_set():
                    raise
                severed = severed + 1 if isinstance(error, Severed) else 0
                if severed == 2:
                    # The first time may be the network's fault, and of many small commands one is likelier to fail.
                    at_a_time, severed = max(1, (at_a_time or batch.count) // 4), 0
                backed_off += back_off(run, tries)
        close(tally)
        run.move()
        waited = self._store.waited() - waited
        if tries == 1:
            self._window.fit(waited, self._store.round_trip())
        self._stats.add(
            lines=tally.lines,
            inserted=0 if job.options.validate else tally.inserted,
            rejected=tally.rejected,
            bytes=tally.bytes,
            batches=1,
            seconds_decode=documents.seconds,
            seconds_encode=time.perf_counter() - began - documents.seconds - waited - backed_off,
            seconds_wait=waited,
            seconds_backoff=backed_off,
        )

    def _guard(self, run: Run) -> None:
        """Raise LeaseLost if the lease is lost; one that may have run out while this process slept is renewed first."""
        if not run.lost.is_set() and time.monotonic() - run.renewed_at >= self._settings.engine_lease_seconds:
            try:
                self.keeper.renew(run)
            except LeaseLost:
                run.lost.set()
        if run.lost.is_set():
            raise LeaseLost(f"the lease of range {run.lease.range.index} of job {run.job.id} was lost")


def _make_room(in_flight: _InFlight, most: int, room: int = 0) -> None:
    """Wait until fewer than `most` batches, with at most `room` bytes, are in flight; raises what a batch raised."""
    while in_flight and (
        len(in_flight) >= most or in_flight[0][0].done() or sum(weight for _, weight in in_flight) > room
    ):
        in_flight[0][0].result()
        in_flight.popleft()


def _ended_early(run: Run) -> Ended:
    """Why the work on a run ended before its range did."""
    return Ended.CANCELLED if run.cancelled.is_set() else Ended.STOPPED
