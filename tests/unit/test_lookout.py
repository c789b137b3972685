"""There is one look ahead at a time, and what it finds is kept until it is taken. No servers."""

import threading
from types import SimpleNamespace

import pytest

from engine.errors import Transient
from engine.load.lookout import FRESH_SECONDS, Lookout


def run_of(job):
    run = SimpleNamespace(job=SimpleNamespace(id=job), lost=threading.Event(), ahead=True)
    run.told_to_end = run.lost.is_set
    return run


def never():
    return False


def test_what_was_found_is_taken_once_and_looked_for_again_only_then():
    looks = []

    def look():
        looks.append(threading.current_thread().name)
        return run_of("a")

    lookout = Lookout(look, never)
    assert lookout.take() is None
    lookout.begin()
    lookout.begin()
    assert lookout.take().job.id == "a"
    assert lookout.take() is None
    lookout.begin()
    lookout.close()
    assert len(looks) == 2
    assert threading.current_thread().name not in looks


def test_a_look_that_fails_is_told_to_whoever_takes_it_and_holds_nothing():
    lookout = Lookout(lambda: (_ for _ in ()).throw(Transient("no primary")), never)
    lookout.begin()
    lookout._found.exception(10)
    assert lookout.holds("a") is None
    with pytest.raises(Transient):
        lookout.take()
    assert lookout.take() is None
    lookout.close()


def test_what_is_found_is_known_when_the_look_is_over():
    go = threading.Event()
    lookout = Lookout(lambda: run_of("a") if go.wait(30) else None, never)
    lookout.begin()
    assert lookout.holds("a") is None
    go.set()
    lookout._found.result(30)
    run = lookout.holds("a")
    assert lookout.holds("b") is None
    run.lost.set()
    assert lookout.holds("a") is None
    lookout.close()


def test_what_is_found_may_begin_once_it_is_known_that_nothing_is_paused():
    go, run = threading.Event(), run_of("a")
    lookout = Lookout(lambda: run, lambda: not go.wait(30))
    assert lookout.ready() is None
    lookout.begin()
    lookout._found.result(30)
    assert lookout.ready() is None
    lookout.begin()
    assert lookout.ready() is None
    go.set()
    lookout._allowed.result(30)
    assert lookout.ready() is run
    run.ahead = False
    assert lookout.ready() is None, "it has begun"
    assert lookout.take() is run
    lookout.begin()
    lookout._found.result(30)
    run.ahead = True
    assert lookout.ready() is None, "what was asked before is no answer for this look"
    lookout.close()


def test_that_nothing_is_paused_is_not_believed_for_long(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("engine.load.lookout.time.monotonic", lambda: now[0])
    run = run_of("a")
    lookout = Lookout(lambda: run, never)
    lookout.begin()
    lookout.begin()
    lookout._allowed.result(30)
    now[0] += 0.9 * FRESH_SECONDS
    assert lookout.ready() is run
    now[0] += 0.2 * FRESH_SECONDS
    assert lookout.ready() is None
    lookout.close()


def fails():
    raise Transient("no primary")


@pytest.mark.parametrize(
    ("look", "paused"),
    [
        (lambda: None, never),
        (fails, never),
        (lambda: run_of("a"), fails),
        (lambda: run_of("a"), lambda: True),
        (lambda: lost(run_of("a")), never),
    ],
    ids=["nothing found", "the look failed", "the question failed", "paused", "the lease is lost"],
)
def test_nothing_begins_where_anything_speaks_against_it(look, paused):
    lookout = Lookout(look, paused)
    lookout.begin()
    lookout.begin()
    lookout.close()
    assert lookout._allowed.done()
    assert lookout.ready() is None


def lost(run):
    run.lost.set()
    return run
