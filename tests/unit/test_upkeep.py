"""When a worker does its periodic work. No servers."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from engine.fleet.upkeep import PRUNE_SECONDS, SETTLE_SECONDS, Upkeep


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("engine.fleet.upkeep.time.monotonic", lambda: now[0])
    monkeypatch.setattr("engine.fleet.upkeep.random.uniform", lambda low, high: (low + high) / 2)
    return now


@pytest.fixture
def upkeep(clock):
    queue = Mock()
    queue.admit_due.return_value = queue.stop_overdue.return_value = 0
    ledger = Mock()
    ledger.expire.return_value = []
    uploads = Mock()
    uploads.sweep.return_value = 0
    stop = Mock()
    stop.is_set.return_value = False
    return Upkeep(Mock(), ledger, queue, uploads, Mock(), 30, "worker", stop, lambda: None)


def test_uploads_are_swept_however_much_history_there_is_to_delete(upkeep, clock):
    upkeep._retention = Mock()
    upkeep._retention.prune.return_value = 200
    while clock[0] < 1000.0 + 3.5 * PRUNE_SECONDS:
        upkeep.clean_up()
        clock[0] += 60
    assert upkeep._retention.prune.call_count > 200
    assert upkeep._uploads.sweep.call_count == 4


def test_a_job_that_is_to_stop_and_that_nobody_comes_to_is_brought_to_its_end(upkeep, clock):
    upkeep._queue.open_jobs.stopping.side_effect = lambda: iter([[SimpleNamespace(id="a"), SimpleNamespace(id="b")]])
    for _ in range(int(10 * SETTLE_SECONDS)):
        upkeep.see_to_due()
        clock[0] += 1
    settled = [call.args[0] for call in upkeep._queue.settle.call_args_list]
    assert settled == ["a", "b"] * (len(settled) // 2)
    assert 5 <= len(settled) // 2 <= 10
