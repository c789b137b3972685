"""The heartbeat that a worker shares with its supervisor is never read half written."""

import multiprocessing

from engine.fleet.heartbeat import Heartbeat


def _move(beat, moving):
    while True:
        beat.touch()
        moving.set()


def test_a_worker_that_moves_without_end_is_never_seen_as_one_that_does_not():
    fork = multiprocessing.get_context("fork")
    beat, moving = Heartbeat(), fork.Event()
    worker = fork.Process(target=_move, args=(beat, moving), daemon=True)
    worker.start()
    try:
        assert moving.wait(60)
        ages = [beat.age() for _ in range(300_000)]
    finally:
        worker.kill()
        worker.join()
    # If times were read half written, thousands of these would be off by years, or by the machine's uptime.
    assert [age for age in ages if not -60 < age < 60] == []
    assert worker.exitcode == -9


def test_marks_do_not_touch_the_clock_and_the_memory_can_be_given_back():
    beat = Heartbeat()
    assert (beat.booted(), beat.released()) == (False, False)
    beat.mark_released()
    beat.mark_booted()
    assert (beat.booted(), beat.released()) == (True, True)
    assert -60 < beat.age() < 60
    beat.close()
