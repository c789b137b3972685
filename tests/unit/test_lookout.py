"""There is one look ahead at a time, and what it finds is kept until it is taken. No servers."""

import threading
from types import SimpleNamespace

import pytest

from engine.errors import Transient
from engine.load.lookout import Lookout


def run_of(job):
    return SimpleNamespace(job=SimpleNamespace(id=job), lost=threading.Event())


def test_what_was_found_is_taken_once_and_looked_for_again_only_then():
    looks = []

    def look():
        looks.append(threading.current_thread().name)
        return run_of("a")

    lookout = Lookout(look)
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
    lookout = Lookout(lambda: (_ for _ in ()).throw(Transient("no primary")))
    lookout.begin()
    lookout._found.exception(10)
    assert lookout.holds("a") is None
    with pytest.raises(Transient):
        lookout.take()
    assert lookout.take() is None
    lookout.close()


def test_what_is_found_is_known_when_the_look_is_over():
    go = threading.Event()
    lookout = Lookout(lambda: run_of("a") if go.wait(10) else None)
    lookout.begin()
    assert lookout.holds("a") is None
    go.set()
    lookout._found.result(10)
    run = lookout.holds("a")
    assert lookout.holds("b") is None
    run.lost.set()
    assert lookout.holds("a") is None
    lookout.close()
