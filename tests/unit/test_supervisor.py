"""What a supervisor does on signals and when its workers do not leave in time; with children that do not exist."""

import os
import signal
import time

import pytest

from engine.fleet.heartbeat import Heartbeat
from engine.fleet.supervisor import Supervisor, _Child, _Slot
from engine.fleet.worker import WorkerIdentity
from engine.settings import Settings


@pytest.fixture
def kept(monkeypatch):
    """A supervisor of two children that do not exist, and the signals that it sends to them."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    supervisor = Supervisor(Settings(engine_workers=2, engine_grace_seconds=30), lambda *_: 0)
    for slot, pid in enumerate((7, 8)):
        supervisor._slots.append(_Slot(slot, pid=pid))
        supervisor._children[pid] = _Child(WorkerIdentity("h", "b", slot, pid, (), 1), Heartbeat(), time.monotonic())
    return supervisor, sent


def test_workers_that_take_longer_than_the_grace_are_killed_and_that_is_told(kept, monkeypatch):
    supervisor, sent = kept
    supervisor._signals.append(signal.SIGTERM)
    supervisor._handle_signals()
    assert sent == [(7, signal.SIGTERM), (8, signal.SIGTERM)]
    supervisor._kill_silent()
    assert (len(sent), supervisor._exit) == (2, 0)
    later = time.monotonic() + 30
    monkeypatch.setattr(time, "monotonic", lambda: later)
    supervisor._kill_silent()
    assert sent[2:] == [(7, signal.SIGKILL), (8, signal.SIGKILL)]
    assert supervisor._exit == 1


@pytest.mark.parametrize("numbers", [[signal.SIGQUIT], [signal.SIGTERM, signal.SIGINT]])
def test_quit_or_a_second_signal_leaves_the_workers_a_second(kept, numbers):
    supervisor, sent = kept
    supervisor._signals += numbers
    supervisor._handle_signals()
    assert sent == [(7, signal.SIGTERM), (8, signal.SIGTERM), (7, signal.SIGQUIT), (8, signal.SIGQUIT)]
    assert supervisor._deadline <= time.monotonic() + 1


def test_ttou_leaves_one_worker_and_hands_on_the_leases_of_a_place_that_was_empty(kept):
    supervisor, sent = kept
    del supervisor._children[8]
    supervisor._slots[1].pid, supervisor._slots[1].dead = None, ("gone",)
    supervisor._signals += [signal.SIGTTOU, signal.SIGTTOU]
    supervisor._handle_signals()
    assert [s.number for s in supervisor._slots] == [0]
    assert supervisor._slots[0].dead == ("gone",)
    assert sent == []


def test_the_leases_of_a_worker_that_was_one_too_many_and_died_go_to_the_first_place(kept):
    supervisor, sent = kept
    supervisor._signals.append(signal.SIGTTOU)
    supervisor._handle_signals()
    assert sent == [(8, signal.SIGTERM)]
    child = supervisor._children.pop(8)
    child.heartbeat.mark_booted()
    supervisor._bury(8, child, -signal.SIGKILL)
    assert supervisor._slots[0].dead == (child.identity.name,)
    assert supervisor._slots[0].pid == 7
