"""How long a thread has waited for the database, by the driver's events. No servers."""

import threading
from unittest.mock import Mock

import pytest

from engine.control.waits import WINDOW_SECONDS, RecentMinimum, Waits

EVENT = Mock(duration_micros=1000)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is set."""
    now = Mock(return_value=0.0)
    monkeypatch.setattr("engine.control.waits.time.perf_counter", now)
    return now


def at(clock, seconds, what):
    clock.return_value = seconds
    what(EVENT)


def test_a_thread_waits_for_its_connection_and_for_its_answer_and_encodes_between(clock):
    waits = Waits(lambda: None)
    at(clock, 1.0, waits.connection_check_out_started)
    at(clock, 3.0, waits.connection_checked_out)
    at(clock, 10.0, waits.started)
    at(clock, 14.0, waits.succeeded)
    assert waits.waited == 2.0 + 4.0


@pytest.mark.parametrize("ended", ["connection_checked_out", "connection_check_out_failed"])
def test_what_a_handshake_asks_is_waited_for_once(clock, ended):
    waits = Waits(lambda: None)
    at(clock, 0.0, waits.connection_check_out_started)
    at(clock, 1.0, waits.started)  # the handshake's authentication
    at(clock, 2.0, waits.succeeded)
    at(clock, 3.0, getattr(waits, ended))
    assert waits.waited == 3.0
    at(clock, 4.0, waits.started)
    at(clock, 5.0, waits.failed)
    assert waits.waited == 4.0


def test_each_thread_has_waited_for_itself(clock):
    waits = Waits(lambda: None)
    at(clock, 0.0, waits.started)
    clock.return_value = 5.0
    found = []

    def other():
        found.append(waits.waited)
        waits.connection_check_out_failed(Mock())  # this thread has not seen this check-out begin
        found.append(waits.waited)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    waits.succeeded(EVENT)
    assert (found, waits.waited) == ([0.0, 0.0], 5.0)


def test_the_way_to_the_server_takes_what_the_shortest_answer_of_late_took():
    waits = Waits(lambda: None)
    for micros in (30_000, 21_000, 90_000):
        waits.succeeded(Mock(duration_micros=micros))
    assert waits.answers.seconds() == 0.021


def test_the_shortest_answer_counts_for_a_while():
    shortest = RecentMinimum()
    assert shortest.seconds() == 0
    shortest.add(0.3, 0.0)
    shortest.add(0.1, 1.0)
    shortest.add(0.2, 2.0)
    assert shortest.seconds() == 0.1
    shortest.add(0.5, WINDOW_SECONDS)
    assert shortest.seconds() == 0.1
    shortest.add(0.4, 2 * WINDOW_SECONDS)
    assert shortest.seconds() == 0.4
