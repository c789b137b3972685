"""What a thread is said to have waited for the database."""

import threading
from unittest.mock import Mock

import pytest

from engine.store import _Moves

EVENT = Mock(duration_micros=1000)


@pytest.fixture
def clock(monkeypatch):
    """Stands still unless it is set."""
    now = Mock(return_value=0.0)
    monkeypatch.setattr("engine.store.time.perf_counter", now)
    return now


def at(clock, seconds, what):
    clock.return_value = seconds
    what(EVENT)


def test_a_thread_waits_for_its_connection_and_for_its_answer_and_encodes_between(clock):
    moves = _Moves(lambda: None)
    at(clock, 1.0, moves.connection_check_out_started)
    at(clock, 3.0, moves.connection_checked_out)
    at(clock, 10.0, moves.started)
    at(clock, 14.0, moves.succeeded)
    assert moves.waited == 2.0 + 4.0


@pytest.mark.parametrize("ended", ["connection_checked_out", "connection_check_out_failed"])
def test_what_a_handshake_asks_is_waited_for_once(clock, ended):
    moves = _Moves(lambda: None)
    at(clock, 0.0, moves.connection_check_out_started)
    at(clock, 1.0, moves.started)  # its authentication
    at(clock, 2.0, moves.succeeded)
    at(clock, 3.0, getattr(moves, ended))
    assert moves.waited == 3.0
    at(clock, 4.0, moves.started)
    at(clock, 5.0, moves.failed)
    assert moves.waited == 4.0


def test_each_thread_has_waited_for_itself(clock):
    moves = _Moves(lambda: None)
    at(clock, 0.0, moves.started)
    clock.return_value = 5.0
    found = []

    def other():
        found.append(moves.waited)
        moves.connection_check_out_failed(Mock())  # of a check-out that this thread did not see begin
        found.append(moves.waited)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    moves.succeeded(EVENT)
    assert (found, moves.waited) == ([0.0, 0.0], 5.0)


def test_the_way_to_the_server_takes_what_the_shortest_answer_of_late_took():
    moves = _Moves(lambda: None)
    for micros in (30_000, 21_000, 90_000):
        moves.succeeded(Mock(duration_micros=micros))
    assert moves.answers.seconds() == 0.021
