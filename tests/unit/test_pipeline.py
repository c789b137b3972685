"""One lease: its batches in flight, its retries, where its time goes, and the look for the next range. No servers."""

import threading
import time
from unittest.mock import MagicMock, Mock, call

import numpy as np
import pytest

from engine.control.stats import Stats
from engine.errors import LeaseLost, Severed, Transient
from engine.load.pipeline import Ended, Pipeline
from engine.load.run import Run
from engine.model import ByteRange, Lease, Tally
from engine.settings import Settings
from engine.text.batches import Batch
from tests.conftest import batch_of


def test_pauses_between_tries_are_not_counted_as_encoding(monkeypatch):
    pauses = iter((1.5, 2.5))
    monkeypatch.setattr("engine.load.pipeline.back_off", lambda run, tries: next(pauses))
    clock = iter((0.0, 4.5))
    lease = Lease("0" * 24, ByteRange(0, 0, 3), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    sink = Mock()
    sink.write.side_effect = [Transient("away"), Transient("away"), (Tally(lines=1), [])]
    store = Mock()
    store.waited.return_value = store.round_trip.return_value = 0.0
    stats = Stats()
    pipeline = Pipeline(Settings(), store, *[Mock()] * 4, stats, still=lambda: 0.0)
    batch = Batch(0, 3, 0, b"{}\n", np.array([2]))
    monkeypatch.setattr("engine.load.pipeline.decode", lambda *what: Mock(seconds=0.0))
    monkeypatch.setattr("engine.load.pipeline.time.perf_counter", lambda: next(clock))
    pipeline._write(run, sink, batch, lambda tally: None)
    pipeline.close()
    counts = stats.counts()
    assert (counts["seconds_backoff"], counts["seconds_encode"], counts["retries"]) == (4.0, 0.5, 2)


def test_the_wait_for_the_last_batches_of_a_range_is_told_apart_from_that_for_room(monkeypatch):
    """Nothing is read during the wait at the end of a range, so it costs time that a wait for room does not."""
    lease = Lease("0" * 24, ByteRange(0, 0, 3), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    stats = Stats()
    pipeline = Pipeline(Settings(), *[Mock()] * 5, stats, still=lambda: 0.0)
    batch, written = Batch(0, 3, 0, b"{}\n", np.array([2])), threading.Event()
    clock = iter((0.0, 1.0, 10.0, 14.0))
    monkeypatch.setattr("engine.load.pipeline.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(pipeline, "_begin", lambda run: (Mock(), Mock(done=True), Mock()))
    monkeypatch.setattr(pipeline, "_ahead_seconds", lambda: 0.2)
    monkeypatch.setattr(pipeline._reading, "batches", lambda *what: (one for one in [batch]))
    monkeypatch.setattr(pipeline, "_write", lambda *what: written.set())
    assert pipeline._work(run) is Ended.DONE
    pipeline.close()
    counts = stats.counts()
    assert written.is_set()
    assert (counts["seconds_stall"], counts["seconds_drain"]) == (1.0, 4.0)


def worked(monkeypatch, seconds_each, round_trip, batches=100, at_once=1):
    """How many batches had been read at each call near the end of a range; the last comes when all of it is read.

    The range has `batches` of them. Each takes `seconds_each` to write, and `at_once` of them are read before the first
    is written.
    """
    lease = Lease("0" * 24, ByteRange(0, 0, batches * 10), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    store, now, read, unwritten, looks = Mock(), [50.0], [], [], []
    store.round_trip.return_value = round_trip
    pipeline = Pipeline(
        Settings(), store, *[Mock()] * 4, Stats(), still=lambda: 0.0, near_end=lambda: looks.append(len(read))
    )
    monkeypatch.setattr("engine.load.pipeline.time.monotonic", lambda: now[0])
    monkeypatch.setattr(pipeline, "_begin", lambda run: (Mock(), Mock(done=True), Mock()))
    real = run.opened
    monkeypatch.setattr(run, "opened", lambda batch: unwritten.append(real(batch)))
    monkeypatch.setattr(pipeline, "_write", lambda *what: None)

    def batches_of(*what):
        for n in range(batches):
            if len(unwritten) == at_once:
                now[0] += seconds_each
                unwritten.pop(0)(Tally(lines=1))
            read.append(n)
            yield Batch(n * 10, n * 10 + 10, n, b"{}\n", np.array([2]))

    monkeypatch.setattr(pipeline._reading, "batches", batches_of)
    assert pipeline._work(run) is Ended.DONE
    pipeline.close()
    return looks


def test_the_next_range_is_looked_for_once_shortly_before_the_end_of_this_one(monkeypatch):
    assert worked(monkeypatch, 0.0101, 0.0003) == [82, 100]
    assert worked(monkeypatch, 0.101, 0.0003) == [100, 100]
    assert worked(monkeypatch, 0.0101, 0.020) == [54, 100]
    assert worked(monkeypatch, 0.0001, 0.0003) == [2, 100]


def test_how_fast_a_range_is_read_says_nothing_of_how_soon_it_ends(monkeypatch):
    """The pace is that of acknowledged batches: the first few are read before any is written."""
    assert worked(monkeypatch, 0.0101, 0.0003, at_once=5) == [86, 100]
    assert worked(monkeypatch, 0.0101, 0.0003, batches=4, at_once=5) == [4]


def test_the_next_run_is_kept_and_requested_and_its_answer_dropped_if_it_does_not_begin():
    lease = Lease("0" * 24, ByteRange(1, 3, 6), "token", 1, 3, Tally(), 0, 0, False)
    run = Run(MagicMock(source=Mock(size=6)), lease, threading.Event(), lambda: None, ahead=True)
    objects = Mock()
    pipeline = Pipeline(Settings(), Mock(), objects, Mock(), Mock(), Mock(), Stats(), still=lambda: 0.0)
    pipeline.expect(run)
    assert pipeline.keeper.holds_any()
    pipeline._reading._requests.submit(lambda: None).result()
    objects.open.assert_called_once_with(run.job.source, 2, 6)
    run.cancelled.set()
    assert pipeline.run(run) is Ended.CANCELLED
    objects.open.return_value.drop.assert_called_once()
    pipeline.close()


@pytest.mark.parametrize(("flag", "ended"), [("stop", Ended.STOPPED), ("cancelled", Ended.CANCELLED)])
def test_a_lease_taken_ahead_of_a_job_that_has_ended_is_given_back_unread(flag, ended):
    lease = Lease("0" * 24, ByteRange(0, 0, 3), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None, ahead=True)
    getattr(run, flag).set()
    objects, ledger = Mock(), Mock()
    pipeline = Pipeline(Settings(), Mock(), objects, ledger, Mock(), Mock(), Stats(), still=lambda: 0.0)
    assert pipeline.run(run) is ended
    pipeline.close()
    objects.open.assert_not_called()
    ledger.begin.assert_not_called()
    ledger.give_back.assert_called_once()


def test_a_lease_taken_ahead_begins_before_anything_is_read(monkeypatch):
    lease = Lease("0" * 24, ByteRange(0, 0, 3), "token", 1, 0, Tally(), 0, 0, False)
    ledger = Mock()
    ledger.begin.side_effect = LeaseLost("it is another's")
    objects = Mock()
    pipeline = Pipeline(Settings(), Mock(), objects, ledger, Mock(), Mock(), Stats(), still=lambda: 0.0)
    with pytest.raises(LeaseLost):
        pipeline.run(Run(MagicMock(), lease, threading.Event(), lambda: None, ahead=True))
    pipeline.close()
    objects.open.assert_not_called()
    ledger.give_back.assert_not_called()


@pytest.mark.parametrize("both_held", [True, False, None], ids=["held", "one is lost", "none follows"])
def test_the_following_run_begins_when_the_range_before_it_is_closed(monkeypatch, both_held):
    lease, ahead = (Lease("0" * 24, ByteRange(n, 0, 3), "token", 1, 0, Tally(), 0, 0, False) for n in range(2))
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    following = Run(MagicMock(), ahead, threading.Event(), lambda: None, ahead=True)
    ledger = Mock()
    ledger.close_all.return_value = both_held
    found = following if both_held is not None else None
    pipeline = Pipeline(
        Settings(), Mock(), Mock(), ledger, *[Mock()] * 2, Stats(), still=lambda: 0.0, following=lambda: found
    )
    monkeypatch.setattr(pipeline, "_work", lambda run: Ended.DONE)
    assert pipeline.run(run) is Ended.DONE
    pipeline.close()
    assert ledger.close_all.mock_calls == ([] if found is None else [call([(lease, Tally())], ahead)])
    assert ledger.close.mock_calls == ([] if both_held else [call(lease, Tally())])
    assert following.ahead is not (both_held is True)


def test_a_range_that_cannot_be_closed_at_once_is_closed_alone_if_the_following_run_may_not_begin_any_more(monkeypatch):
    lease, ahead = (Lease("0" * 24, ByteRange(n, 0, 3), "token", 1, 0, Tally(), 0, 0, False) for n in range(2))
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    following = Run(MagicMock(), ahead, threading.Event(), lambda: None, ahead=True)
    ledger, found = Mock(), iter((following, None))
    ledger.close_all.side_effect = Transient("no primary")
    pipeline = Pipeline(
        Settings(), Mock(), Mock(), ledger, *[Mock()] * 2, Stats(), still=lambda: 0.0, following=lambda: next(found)
    )
    monkeypatch.setattr(pipeline, "_work", lambda run: Ended.DONE)
    monkeypatch.setattr("engine.load.retries.back_off", lambda run, tries: 0.0)
    assert pipeline.run(run) is Ended.DONE
    pipeline.close()
    assert ledger.close.mock_calls == [call(lease, Tally())]
    assert following.ahead


@pytest.mark.parametrize(("round_trip", "size"), [(0.0003, 4), (0.020, 8)])
def test_more_batches_are_sent_at_a_time_where_the_way_takes_much_of_what_one_takes(monkeypatch, round_trip, size):
    lease = Lease("0" * 24, ByteRange(0, 0, 3), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    sink, store, waited = Mock(), Mock(), iter((0.0, 0.040))
    sink.write.return_value = (Tally(lines=1), [])
    store.waited.side_effect = lambda: next(waited)
    store.round_trip.return_value = round_trip
    pipeline = Pipeline(Settings(), store, *[Mock()] * 4, Stats(), still=lambda: 0.0)
    monkeypatch.setattr("engine.load.pipeline.decode", lambda *what: Mock(seconds=0.0))
    pipeline._write(run, sink, Batch(0, 3, 0, b"{}\n", np.array([2])), Mock())
    assert pipeline._window.size == size
    pipeline.close()


@pytest.mark.parametrize("size", [4, 7, 8])
def test_as_many_batches_are_written_at_a_time_as_the_window_has_room_for(monkeypatch, size):
    lease = Lease("0" * 24, ByteRange(0, 0, 300), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    store = Mock()
    store.round_trip.return_value = 0.0
    pipeline = Pipeline(Settings(), store, *[Mock()] * 4, Stats(), still=lambda: 0.0)
    pipeline._window.size = size
    monkeypatch.setattr(pipeline, "_begin", lambda run: (Mock(), Mock(done=True), Mock()))
    begun, all_at_work = [], threading.Event()

    def write(*what):
        begun.append(what)
        if len(begun) == size:
            all_at_work.set()
        assert all_at_work.wait(30)

    monkeypatch.setattr(pipeline, "_write", write)
    monkeypatch.setattr(
        pipeline._reading, "batches", lambda *what: (Batch(n, n + 1, n, b"{}\n", np.array([2])) for n in range(20))
    )
    assert pipeline._work(run) is Ended.DONE
    pipeline.close()
    assert len(begun) == 20


@pytest.mark.parametrize(("line", "most"), [(b"x" * 100_000, 6), (b"[%b]" % b",".join([b"1"] * 50_000), 2)])
def test_fewer_batches_of_small_values_are_written_at_a_time(monkeypatch, line, most):
    """They are small as text only: in memory, and as BSON, they take several times as much."""
    lease = Lease("0" * 24, ByteRange(0, 0, 300), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    store = Mock()
    store.round_trip.return_value = 0.0
    settings = Settings(engine_batch_bytes=len(line) + 1, engine_writers=6)
    pipeline = Pipeline(settings, store, *[Mock()] * 4, Stats(), still=lambda: 0.0)
    monkeypatch.setattr(pipeline, "_begin", lambda run: (Mock(), Mock(done=True), Mock()))
    at_work, counts, all_at_work = set(), [], threading.Barrier(most)

    def write(run, sink, batch, close):
        at_work.add(batch)
        all_at_work.wait(30)
        time.sleep(0.02)  # for one more than there may be to begin
        counts.append(len(at_work))
        at_work.remove(batch)

    monkeypatch.setattr(pipeline, "_write", write)
    monkeypatch.setattr(pipeline._reading, "batches", lambda *what: (batch_of(line) for n in range(18)))
    assert pipeline._work(run) is Ended.DONE
    pipeline.close()
    assert (len(counts), max(counts)) == (18, most)


def tried(sink, monkeypatch, guard=None):
    """How many documents at a time the sink was told to write, by try; None means all."""
    lease = Lease("0" * 24, ByteRange(0, 0, 3000), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(MagicMock(), lease, threading.Event(), lambda: None)
    store = Mock()
    store.waited.return_value = store.round_trip.return_value = 0.0
    pipeline = Pipeline(Settings(), store, *[Mock()] * 4, Stats(), still=lambda: 0.0)
    monkeypatch.setattr("engine.load.pipeline.back_off", lambda run, tries: 0.0)
    monkeypatch.setattr("engine.load.pipeline.decode", lambda *what: Mock(seconds=0.0))
    if guard is not None:
        monkeypatch.setattr(pipeline, "_guard", guard)
    batch = Batch(0, 3000, 0, b"{}\n" * 1000, np.arange(2, 3000, 3))
    pipeline._write(run, sink, batch, lambda tally: None)
    pipeline.close()
    return [call.args[1] for call in sink.write.call_args_list]


SEVERED, AWAY = Severed("closed"), Transient("no primary")


@pytest.mark.parametrize(
    ("errors", "sizes"),
    [
        ([SEVERED] * 5, [None, None, 250, 250, 62, 62]),
        ([SEVERED, SEVERED, AWAY, AWAY, AWAY], [None, None, 250, 250, 250, 250]),
        ([SEVERED, AWAY, SEVERED, AWAY, SEVERED], [None] * 6),
    ],
)
def test_a_batch_is_parted_only_when_its_connection_was_closed_twice_in_a_row(monkeypatch, errors, sizes):
    sink = Mock()
    sink.write.side_effect = [*errors, (Tally(lines=1), [])]
    assert tried(sink, monkeypatch) == sizes


def test_a_lease_that_cannot_be_asked_for_at_once_is_asked_for_again_before_anything_is_written(monkeypatch):
    sink, answers = Mock(), iter((Transient("no primary"), None))
    sink.write.return_value = (Tally(lines=1), [])

    def guard(run):
        if error := next(answers, None):
            assert not sink.write.called
            raise error

    assert tried(sink, monkeypatch, guard=guard) == [None]


def test_what_must_be_forgotten_before_a_range_is_gone_on_with_is_tried_again(monkeypatch):
    lease = Lease("0" * 24, ByteRange(0, 0, 3), "token", 1, 0, Tally(), 0, 0, True)
    rejects = Mock()
    rejects.forget.side_effect = [Transient("no primary"), None]
    pipeline = Pipeline(Settings(), Mock(), Mock(), Mock(), Mock(), rejects, Stats(), still=lambda: 0.0)
    monkeypatch.setattr("engine.load.retries.back_off", lambda run, tries: 0.0)
    monkeypatch.setattr(pipeline, "_work", lambda run: Ended.DONE)
    assert pipeline.run(Run(MagicMock(), lease, threading.Event(), lambda: None)) is Ended.DONE
    pipeline.close()
    assert rejects.forget.call_count == 2
