"""When a worker collects cyclic garbage."""

import gc

import pytest

from engine.fleet.memory import COLLECT_SECONDS, IDLE_SECONDS, Garbage


@pytest.fixture
def looks(monkeypatch):
    """The clock, in seconds, for the test to set, and the times of the collections so far."""
    clock, found = [100.0], []
    monkeypatch.setattr("engine.fleet.memory.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("engine.fleet.memory.gc.collect", lambda: found.append(clock[0]))
    return clock, found


def test_garbage_is_looked_for_now_and_then(looks):
    clock, found = looks
    garbage = Garbage()
    for done in range(1, 31):
        garbage.collect(done)
        clock[0] += COLLECT_SECONDS / 10
    assert found == [100.0 + COLLECT_SECONDS, 100.0 + 2 * COLLECT_SECONDS]


def test_a_worker_that_has_done_nothing_since_the_last_look_looks_more_rarely(looks):
    clock, found = looks
    garbage = Garbage()
    clock[0] += COLLECT_SECONDS
    garbage.collect(1)
    while clock[0] < 100.0 + 2.5 * IDLE_SECONDS:
        clock[0] += COLLECT_SECONDS
        garbage.collect(1)
    garbage.collect(2)
    first = 100.0 + COLLECT_SECONDS
    assert found == [first, first + IDLE_SECONDS, first + 2 * IDLE_SECONDS, 100.0 + 2.5 * IDLE_SECONDS]


def test_what_exists_when_a_worker_is_ready_is_exempt():
    before = gc.get_freeze_count()
    try:
        Garbage.exempt()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
