"""When the keeper renews the leases of a worker, which also updates the numbers of their jobs. No servers."""

import threading
import time
from typing import Any
from unittest.mock import Mock

import pytest

from engine.errors import LeaseLost, Transient
from engine.load.keeper import TICK_SECONDS, Keeper
from engine.load.run import Run
from tests.running import until

SHORT = 0.26 * TICK_SECONDS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("engine.load.keeper.time.monotonic", lambda: now[0])
    return now


def kept(keeper: Keeper, clock: list[float], *runs: Any, seconds: float) -> None:
    """Hold these runs for `seconds`, with a turn of the keeper about every quarter of a tick."""
    keeper.hold(*runs)
    for _ in range(round(seconds / SHORT)):
        clock[0] += SHORT
        keeper.turn()
    keeper.drop()


@pytest.fixture
def keeper(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Keeper:
    keeper = Keeper(Mock(), Mock(**{"tend.return_value": False}), 30, lambda: 0.0, lambda run: None)
    monkeypatch.setattr(keeper, "renew", Mock())
    return keeper


def waiting() -> Run:
    return Run(Mock(), Mock(deaths=0), threading.Event(), lambda: None, ahead=True)


def renewed(keeper: Keeper) -> list[Any]:
    return [call.args[0] for call in keeper.renew.call_args_list]  # type: ignore[attr-defined]


def test_ranges_of_less_than_a_tick_move_the_numbers_of_their_job(keeper: Keeper, clock: list[float]) -> None:
    first, second = Mock(), Mock()
    for run in (first, second) * 4:
        kept(keeper, clock, run, seconds=2 * SHORT)
    assert [second] * 4 == renewed(keeper)


def test_small_jobs_that_end_within_a_tick_are_not_told_of_before_their_end(keeper: Keeper, clock: list[float]) -> None:
    """Their end records everything, so that a renewal would only cost time."""
    for _ in range(8):
        kept(keeper, clock, Mock(), Mock(), seconds=2 * SHORT)
    assert renewed(keeper) == []


def test_the_leases_of_small_jobs_that_take_longer_are_all_renewed(keeper: Keeper, clock: list[float]) -> None:
    runs = Mock(), Mock()
    kept(keeper, clock, *runs, seconds=2 * TICK_SECONDS)
    assert [*runs, *runs] == renewed(keeper)


def test_small_jobs_do_not_hold_up_the_numbers_of_a_large_one(keeper: Keeper, clock: list[float]) -> None:
    large = Mock()
    for _ in range(4):
        kept(keeper, clock, Mock(), Mock(), seconds=2 * SHORT)
        kept(keeper, clock, large, seconds=2 * SHORT)
    assert [large] * 4 == renewed(keeper)


def test_nothing_is_renewed_that_was_let_go(keeper: Keeper, clock: list[float]) -> None:
    kept(keeper, clock, Mock(), seconds=SHORT)
    clock[0] += 2 * TICK_SECONDS
    keeper.turn()
    assert renewed(keeper) == []


def test_the_lease_that_comes_next_is_kept_between_two_runs_too(keeper: Keeper, clock: list[float]) -> None:
    told = Mock()
    keeper._report = told
    run, ahead = Mock(), waiting()
    keeper.hold(run)
    keeper.hold_next(ahead)
    keeper.drop()
    keeper.turn()
    assert renewed(keeper) == []
    for _ in range(2):
        clock[0] += TICK_SECONDS
        keeper.turn()
        keeper.turn()
    assert renewed(keeper) == [ahead, ahead]
    told.assert_not_called()  # the worker is still working on another run
    keeper.hold(ahead)
    keeper.drop()
    clock[0] += TICK_SECONDS
    keeper.turn()
    assert renewed(keeper) == [ahead, ahead]


def test_the_lease_that_comes_next_is_called_off_with_its_job(keeper: Keeper, clock: list[float]) -> None:
    keeper._rollup.tend.return_value = True  # type: ignore[attr-defined]
    ahead = waiting()
    keeper.hold_next(ahead)
    clock[0] += TICK_SECONDS
    keeper.turn()
    assert ahead.cancelled.is_set()


@pytest.mark.parametrize("error", [LeaseLost("it is another's"), Transient("no primary"), RuntimeError("a bug")])
def test_a_lease_that_comes_next_and_cannot_be_renewed_is_tried_again_or_is_lost(
    keeper: Keeper, clock: list[float], error: Exception
) -> None:
    keeper.renew.side_effect = error  # type: ignore[attr-defined]
    ahead = waiting()
    keeper.hold_next(ahead)
    for _ in range(2):
        clock[0] += TICK_SECONDS
        keeper.turn()
        keeper.turn()
    lost = isinstance(error, LeaseLost)
    assert (len(renewed(keeper)), ahead.lost.is_set()) == (1 if lost else 2, lost)


@pytest.mark.parametrize("why", ["stop", "cancelled", "lost", "too long"])
def test_a_lease_that_comes_next_is_not_kept_for_ever(keeper: Keeper, clock: list[float], why: str) -> None:
    ahead = waiting()
    keeper.hold_next(ahead)
    if why == "too long":
        clock[0] += 30.0
    else:
        getattr(ahead, why).set()
        clock[0] += TICK_SECONDS
    keeper.turn()
    assert renewed(keeper) == []
    assert not keeper.holds_any()  # so the thread sleeps


def test_what_is_at_work_is_renewed_before_what_comes_next(keeper: Keeper, clock: list[float]) -> None:
    run, ahead = Mock(), waiting()
    keeper.hold(run)
    keeper.hold_next(ahead)
    clock[0] += TICK_SECONDS
    keeper.turn()
    assert renewed(keeper) == [run, ahead]
    # If the current run ends during its renewal, `drop` is waiting: the next run is not renewed in this turn.
    keeper.renew.side_effect = lambda run: setattr(keeper, "_runs", ())  # type: ignore[attr-defined]
    clock[0] += TICK_SECONDS
    keeper.turn()
    assert renewed(keeper) == [run, ahead, run]


def test_a_keeper_of_what_comes_next_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.load.keeper.TICK_SECONDS", 0.05)
    keeper = Keeper(Mock(), Mock(), 30, lambda: 0.0, lambda run: None)
    ticked = threading.Event()
    monkeypatch.setattr(keeper, "tick", lambda run, begun=True: ticked.set())
    keeper.start()
    keeper.hold_next(waiting())
    assert ticked.wait(30)
    keeper.hold(Mock())
    keeper.hold_next(waiting())
    keeper.drop()
    ticked.clear()
    assert ticked.wait(30)


def test_a_worker_that_hangs_does_not_renew_what_comes_next(keeper: Keeper, clock: list[float]) -> None:
    keeper._still = lambda: 30.0
    keeper.hold_next(waiting())
    clock[0] += TICK_SECONDS
    keeper.turn()
    assert renewed(keeper) == []


def test_who_waits_for_a_slow_renewal_shows_that_it_lives(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.load.keeper.STIR_SECONDS", 0.01)
    run, moved = Mock(), threading.Event()
    run.move.side_effect = moved.set
    keeper.hold(run)
    with keeper._busy:
        dropping = threading.Thread(target=keeper.drop)
        dropping.start()
        assert moved.wait(30)
        assert dropping.is_alive()
    dropping.join(30)
    assert not dropping.is_alive()
    with keeper._busy:  # `drop` has released the lock
        pass


def test_a_keeper_of_nothing_sleeps_and_one_of_a_lease_looks_after_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.load.keeper.TICK_SECONDS", 0.05)
    keeper = Keeper(Mock(), Mock(), 30, lambda: 0.0, lambda run: None)
    ticked, turned = threading.Event(), threading.Event()
    monkeypatch.setattr(keeper, "tick", lambda run: ticked.set())
    real = keeper.turn
    monkeypatch.setattr(keeper, "turn", lambda: (turned.set(), real()))
    keeper.start()

    def sleeps():
        turned.clear()
        return not turned.wait(0.2)

    assert sleeps()
    for _ in range(2):
        ticked.clear()
        keeper.hold(Mock())
        assert ticked.wait(30)
        keeper.drop()
        until(sleeps)  # a turn that had begun may not be over yet


def test_small_jobs_that_are_let_go_in_the_midst_of_a_turn_are_not_renewed_any_more(
    keeper: Keeper, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = Mock(), Mock(), Mock()
    letting_go = threading.Thread(target=keeper.drop)

    def slow(run: Any) -> None:
        letting_go.start()
        while keeper._runs:
            time.sleep(0.001)

    monkeypatch.setattr(keeper, "renew", Mock(side_effect=slow))
    keeper.hold(first, *others)
    clock[0] += 2 * TICK_SECONDS
    keeper.turn()
    letting_go.join(30)
    assert renewed(keeper) == [first]
