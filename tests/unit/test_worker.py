"""How a worker ends jobs, takes leases ahead, and stops. MongoDB and S3 are mocked."""

import threading
from typing import Any
from unittest.mock import MagicMock, Mock, call

import pytest

from engine.errors import LeaseLost, Permanent, Transient
from engine.fleet.worker import Worker, WorkerIdentity
from engine.load.pipeline import Ended
from engine.model import JobState
from engine.settings import Settings


@pytest.fixture
def worker() -> Any:
    worker = Worker.__new__(Worker)
    for name in ("_queue", "_ledger", "_chooser", "_stats", "_identity", "_lookout", "_pipeline"):
        setattr(worker, name, Mock())
    worker._last_error = ""
    worker._lookout.holds.return_value = None
    worker._queue.settle.return_value = Mock(state=JobState.FAILED)
    return worker


def test_small_jobs_that_are_done_end_whatever_becomes_of_one_beside_them(worker: Any) -> None:
    lost, done = Mock(), Mock()
    done.mark.return_value = (9, "tally")
    worker._ledger.busy.side_effect = Transient("no primary")
    worker._queue.finish_all.return_value = []
    worker._pipeline.run_together.return_value = ([(lost, LeaseLost("it is another's")), (done, Ended.DONE)], True)
    with pytest.raises(Transient):
        worker._run_together([lost, done])
    worker._queue.finish_all.assert_called_once_with([(done.job, "tally")])


def test_a_job_is_not_asked_about_while_the_worker_has_more_to_do_on_it(worker: Any) -> None:
    run = Mock()
    worker._lookout.holds.side_effect = lambda job_id: run if job_id == run.job.id else None
    worker._settle(run.job)
    worker._ledger.busy.assert_not_called()
    worker._queue.settle.assert_not_called()


def test_what_is_leased_ahead_of_a_job_that_is_stopped_is_called_off(worker: Any) -> None:
    run, ahead = Mock(), Mock()
    worker._lookout.holds.side_effect = lambda job_id: ahead if job_id == run.job.id else None
    worker._failed(run, Permanent("no such key"))
    ahead.cancelled.set.assert_called_once_with()


@pytest.mark.parametrize("error", [LeaseLost("it is another's"), Transient("S3 is away")])
@pytest.mark.parametrize("busy", [True, False])
def test_a_job_is_settled_where_no_range_of_it_is_left_to_wait_for(worker: Any, error: Exception, busy: bool) -> None:
    run = Mock()
    worker._ledger.busy.return_value = busy
    worker._failed(run, error)
    assert worker._queue.settle.call_count == (not busy)


@pytest.mark.parametrize("paused", [False, True])
def test_what_was_leased_ahead_begins_unless_the_queue_is_paused_by_now(worker: Any, paused: bool) -> None:
    run = Mock(ahead=True)
    worker._pipeline.run.return_value = Ended.CANCELLED
    worker._lookout.take.return_value = run
    worker._queue.paused.return_value = paused
    assert worker._found_ahead() is (None if paused else run)
    worker._chooser.release_strays.assert_called_once_with([run])
    assert worker._pipeline.run.call_args_list == ([call(run)] if paused else [])
    assert run.cancelled.set.called == paused


def test_what_has_begun_when_the_last_range_was_closed_goes_on(worker: Any) -> None:
    run = Mock(ahead=False)
    worker._lookout.take.return_value = run
    assert worker._found_ahead() is run
    worker._queue.paused.assert_not_called()


def test_what_has_begun_but_had_to_wait_for_the_end_of_an_error_is_given_back_if_the_queue_is_paused_by_now(
    worker: Any,
) -> None:
    run = Mock(ahead=False)
    worker._pipeline.run.return_value = Ended.CANCELLED
    worker._lookout.take.return_value = run
    worker._last_error = "no primary"
    assert worker._found_ahead() is None
    worker._pipeline.run.assert_called_once_with(run)


def test_what_was_asked_for_ahead_is_forgotten_if_the_database_fails_before_it_begins(worker: Any) -> None:
    run = Mock()
    worker._lookout.take.return_value = run
    worker._queue.paused.side_effect = Transient("no primary")
    with pytest.raises(Transient):
        worker._found_ahead()
    worker._pipeline.forget.assert_called_once_with(run)


def test_what_is_leased_ahead_of_a_job_that_is_cancelled_is_called_off(worker: Any) -> None:
    run, ahead = Mock(), Mock()
    run.job.state = JobState.PROCESSING
    worker._pipeline.run.return_value = Ended.CANCELLED
    worker._lookout.holds.side_effect = lambda job_id: ahead if job_id == run.job.id else None
    worker._run_one(run)
    ahead.cancelled.set.assert_called_once_with()


def test_what_a_look_ahead_has_found_is_kept_until_it_begins(worker: Any) -> None:
    run = Mock()
    worker._upkeep = Mock()
    worker._chooser.take.return_value = [run]
    assert worker._look_ahead() is run
    worker._chooser.take.assert_called_once_with(ahead=True)
    worker._pipeline.expect.assert_called_once_with(run)
    worker._upkeep.clean_up.assert_not_called()


def test_a_worker_that_is_told_to_stop_gives_back_what_it_leased_ahead(monkeypatch: Any) -> None:
    stop, run = threading.Event(), Mock()
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    settings = Settings.model_validate(keys | {"aws_endpoint_url": "http://127.0.0.1:1"})
    monkeypatch.setattr("engine.fleet.worker.Store", MagicMock())
    monkeypatch.setattr("engine.fleet.worker.Reporter", Mock())
    worker = Worker(settings, WorkerIdentity("here", "boot", 0, 0, (), 0), Mock(), stop)
    monkeypatch.setattr(worker, "_boot", lambda: True)
    monkeypatch.setattr(worker._lookout, "_look", lambda: run)
    ran = []

    def turn() -> None:
        worker._pipeline._near_end()  # as near the end of a range
        monkeypatch.setattr(worker._pipeline, "run", lambda run: (ran.append(run), Ended.STOPPED)[1])
        stop.set()

    monkeypatch.setattr(worker, "_turn", turn)
    assert worker.loop() == 0
    assert ran == [run]


def test_what_is_due_by_the_clock_is_no_wait_for_the_queue(worker: Any) -> None:
    waited = [0.0]

    def wait(seconds: float, result: object) -> Any:
        def waits(*args: object, **named: object) -> object:
            waited[0] += seconds
            return result

        return waits

    run = Mock(cautious=False)
    worker._upkeep, worker._garbage, worker._errors, worker._store = Mock(), Mock(), 0, Mock()
    worker._lookout.take.return_value = None
    worker._store.waited = lambda: waited[0]
    worker._upkeep.see_to_due = wait(5.0, None)
    worker._chooser.take, worker._chooser.tried = wait(2.0, [run]), 0
    worker._run = wait(1.0, None)
    worker._turn()
    assert worker._stats.add.call_args_list[-1] == call(seconds_queue=3.0)


def test_a_worker_that_waits_for_mongodb_keeps_nothing_of_what_failed(worker: Any) -> None:
    stop = Mock()
    stop.is_set.side_effect = [False] * 3 + [True]
    worker._stop, worker._heartbeat, worker._errors, worker._last_error = stop, Mock(), 0, ""
    worker._garbage, worker._store = Mock(), Mock()
    worker._store.prepare.side_effect = Transient("no primary")
    assert worker._boot() is False
    assert worker._garbage.collect.call_args_list == [call(1), call(2), call(3)]
