"""Only the holder of the token can change a range, and progress resets what is counted in a row. On a real MongoDB."""

import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta

import pytest
from bson import ObjectId
from pymongo.collection import Collection
from pymongo.errors import NotPrimaryError

from engine.control.leases import ATTEMPTS, DEATHS, VANISHED
from engine.control.ledger import Ledger
from engine.errors import LeaseLost, Transient
from engine.model import ByteRange, Failure, Freed, Tally

WHY = Failure("unavailable", "it was busy")


@pytest.fixture
def job():
    return str(ObjectId())


@pytest.fixture
def opened(ledger, job):
    """A job of one range, which nobody holds."""
    ledger.open(job, [ByteRange(0, 0, 1000)])
    return job


def stored(store, job):
    return store.ranges.find_one({"_id": {"job": ObjectId(job), "index": 0}})


def run_out(store, job):
    """Set the leases of the job's ranges to have run out a minute ago."""
    store.ranges.update_many({"job": ObjectId(job)}, {"$set": {"until": datetime.now(UTC) - timedelta(minutes=1)}})


SPEAK = {
    "renew": lambda ledger, lease: ledger.renew(lease, 500, Tally(lines=5)),
    "close": lambda ledger, lease: ledger.close(lease, Tally(lines=9)),
    "give back": lambda ledger, lease: ledger.give_back(lease, 500, Tally(lines=5)),
    "postpone": lambda ledger, lease: ledger.postpone(lease, 500, Tally(lines=5), WHY),
}


@pytest.mark.parametrize("what", SPEAK)
def test_a_token_of_the_past_changes_nothing_while_another_holds_the_range(store, ledger, opened, what):
    stale = ledger.lease(opened, "zombie")
    run_out(store, opened)
    assert ledger.expire() == [Freed(opened, 0, "zombie")]
    assert ledger.lease(opened, "other").number == stale.number + 1
    before = stored(store, opened)
    with pytest.raises(LeaseLost):
        SPEAK[what](ledger, stale)
    assert stored(store, opened) == before


@pytest.mark.parametrize("what", SPEAK)
def test_nobody_speaks_for_a_range_that_is_done(store, ledger, opened, what):
    lease = ledger.lease(opened, "holder")
    ledger.close(lease, Tally(lines=9))
    before = stored(store, opened)
    with pytest.raises(LeaseLost) if what == "renew" else nullcontext():
        SPEAK[what](ledger, lease)
    assert stored(store, opened) == before


@pytest.mark.parametrize("what", ["close", "give back", "postpone"])
def test_how_a_lease_ended_is_heard_once_however_often_it_is_said(store, ledger, opened, what):
    lease = ledger.lease(opened, "holder")
    SPEAK[what](ledger, lease)
    before = stored(store, opened)
    SPEAK[what](ledger, lease)
    assert stored(store, opened) == before


def test_several_leases_are_closed_again_where_the_answer_was_lost(ledger, opened):
    closed = [(ledger.lease(opened, "holder"), Tally(lines=9))]
    assert ledger.close_all(closed)
    assert ledger.close_all(closed)
    assert ledger.summarize(opened).done == 1


def test_leases_that_are_freed_late_are_those_of_then(store, ledger, opened, monkeypatch):
    """A command that timed out and was repeated must not free a later lease if the server still runs it."""
    ledger.lease(opened, "holder")
    real = Collection.update_many
    leases = []

    def late(*given, **more):
        real(*given, **more)
        leases.append(ledger.lease(opened, "holder"))
        return real(*given, **more)

    monkeypatch.setattr(Collection, "update_many", late)
    ledger.release_strays("holder")
    ledger.close(leases[0], Tally(lines=9))
    assert stored(store, opened)["state"] == "DONE"


def test_a_range_has_one_holder_at_a_time_and_the_next_begins_where_it_stopped(ledger, opened):
    lease = ledger.lease(opened, "first")
    assert (lease.confirmed, lease.number, lease.resumed) == (0, 1, False)
    assert ledger.lease(opened, "second") is None
    ledger.give_back(lease, 400, Tally(lines=4, inserted=4, bytes=400))
    lease = ledger.lease(opened, "second")
    assert (lease.confirmed, lease.tally.lines, lease.number, lease.resumed) == (400, 4, 2, True)


def test_what_an_older_version_has_leased_again_was_not_leased_ahead(store, ledger, opened):
    """An older version does not know `ahead`, and leaves in place what the lease before it set."""
    ledger.lease(opened, "dead", ahead=True)
    ledger.release(["dead"])
    ledger.lease(opened, "of an older version")
    store.ranges.update_one({"job": ObjectId(opened)}, {"$set": {"ahead": "another token"}})
    ledger.release(["of an older version"])
    assert stored(store, opened)["deaths"] == 1


def test_what_is_held_knowingly_is_not_freed(store, ledger, job):
    ledger.open(job, [ByteRange(0, 0, 10), ByteRange(1, 10, 20)])
    known, unknown = ledger.lease(job, "holder"), ledger.lease(job, "holder")
    ledger.release_strays("holder", [known.token])
    ledger.renew(known, known.confirmed, Tally())
    with pytest.raises(LeaseLost):
        ledger.renew(unknown, unknown.confirmed, Tally())


@pytest.mark.parametrize("free", ["died", "vanished"])
def test_a_range_that_was_leased_ahead_is_not_what_its_holder_died_over_until_it_begins(store, ledger, opened, free):
    for begun in (False, True):
        lease = ledger.lease(opened, "holder", ahead=True)
        assert lease.deaths == 0
        if begun:
            ledger.begin(lease)
        if free == "vanished":
            run_out(store, opened)
            assert ledger.expire() == [Freed(opened, 0, "holder")]
        else:
            assert ledger.release(["holder"]) == [Freed(opened, 0, "holder")]
        found = stored(store, opened)
        assert (found["deaths"] + found["vanished"], found["allDeaths"]) == (begun, begun)
        assert (found["state"], "ahead" in found) == ("READY", False)
        with pytest.raises(LeaseLost):
            ledger.begin(lease)


def test_a_lease_that_was_taken_ahead_is_as_good_as_any(store, ledger, opened):
    lease = ledger.lease(opened, "holder", ahead=True)
    ledger.renew(lease, 0, Tally())
    assert stored(store, opened)["ahead"] == lease.token
    ledger.begin(lease)
    ledger.close(lease, Tally(lines=9))
    found = stored(store, opened)
    assert (found["state"], "ahead" in found) == ("DONE", False)


def test_a_range_is_put_down_leased_once(ledger, job):
    other = str(ObjectId())
    [first] = ledger.open_leased({job: ByteRange(0, 0, 1000)}, "first").values()
    assert list(ledger.open_leased({job: ByteRange(0, 0, 1000), other: ByteRange(0, 0, 5)}, "second")) == [other]
    ledger.renew(first, 10, Tally())
    assert ledger.lease(job, "second") is None


def test_ranges_closed_together_are_done_and_one_that_was_lost_is_told(store, ledger):
    jobs = [str(ObjectId()) for _ in range(3)]
    leases = list(ledger.open_leased({job: ByteRange(0, 0, 1000) for job in jobs}, "holder").values())
    assert ledger.close_all([(lease, Tally(lines=1)) for lease in leases[:1]])
    run_out(store, jobs[1])
    ledger.expire()
    assert not ledger.close_all([(lease, Tally(lines=1)) for lease in leases[1:]])
    assert [stored(store, job)["state"] for job in jobs] == ["DONE", "READY", "DONE"]


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_lease_taken_ahead_begins_with_the_command_that_closes_the_range_before_it(store, ledger, lost):
    jobs = [str(ObjectId()) for _ in range(2)]
    for job in jobs:
        ledger.open(job, [ByteRange(0, 0, 1000)])
    leases = [ledger.lease(job, "holder", ahead=job == jobs[1]) for job in jobs]
    until = stored(store, jobs[1])["until"]
    time.sleep(0.01)
    if lost is not None:
        run_out(store, jobs[lost])
        ledger.expire()
    for _ in range(2):  # again, as if the answer had been lost
        assert ledger.close_all([(leases[0], Tally(lines=1))], leases[1]) == (lost is None)
        found = [stored(store, job) for job in jobs]
        assert [each["state"] for each in found] == [
            "READY" if lost == 0 else "DONE",
            "READY" if lost == 1 else "LEASED",
        ]
        assert "ahead" not in found[1]
        assert lost == 1 or found[1]["until"] > until
    ledger.release(["holder"])
    assert stored(store, jobs[1])["deaths"] == (lost != 1)


def test_a_lease_that_is_renewed_does_not_run_out(store, opened, monkeypatch):
    monkeypatch.setattr("engine.control.ledger.EXPIRY_GRACE_SECONDS", 0)
    lease = Ledger(store, 1).lease(opened, "holder")
    until = stored(store, opened)["until"]
    ledger = Ledger(store, 60)
    ledger.renew(lease, 10, Tally())
    assert stored(store, opened)["until"] > until
    time.sleep(1.1)  # the lease would have run out
    assert ledger.expire() == []


@pytest.mark.parametrize("letting_go", ["renew", "give back", "postpone"])
def test_deaths_in_a_row_end_with_progress_however_it_is_told(store, ledger, opened, letting_go):
    for _ in range(DEATHS - 1):
        ledger.lease(opened, "dead")
        ledger.release(["dead"])
    lease = ledger.lease(opened, "alive")
    assert lease.deaths == DEATHS - 1
    SPEAK[letting_go](ledger, lease)
    if letting_go == "renew":
        ledger.give_back(lease, 500, Tally(lines=5))
    store.ranges.update_many({}, {"$unset": {"notBefore": ""}})
    ledger.lease(opened, "dead")
    ledger.release(["dead"])
    found = stored(store, opened)
    assert (found["state"], found["deaths"], found["allDeaths"]) == ("READY", 1, DEATHS)


def test_the_third_death_at_one_byte_fails_the_range_and_says_where(store, ledger, opened):
    lease = ledger.lease(opened, "first")
    ledger.give_back(lease, 400, Tally(lines=4))
    for number in range(DEATHS):
        assert ledger.lease(opened, f"dead {number}") is not None
        ledger.release([f"dead {number}"])
    found = stored(store, opened)
    assert found["state"] == "FAILED"
    assert "3 workers in a row died at byte 400 of the range from byte 0 to 1000" in found["failure"]["message"]


def test_holders_that_vanish_are_given_more_patience_and_deaths_count_with_them(store, ledger, opened):
    for number in range(VANISHED):
        assert ledger.lease(opened, "gone") is not None
        if number == 3:
            ledger.release(["gone"])
        else:
            run_out(store, opened)
            ledger.expire()
    assert stored(store, opened)["state"] == "FAILED"


def test_attempts_are_spent_in_a_row_only_and_a_wrong_clock_spends_none(store, ledger, opened):
    def put_off(confirmed, **more):
        store.ranges.update_many({}, {"$unset": {"notBefore": ""}})
        ledger.postpone(ledger.lease(opened, "holder"), confirmed, Tally(), WHY, **more)
        return stored(store, opened)

    for number in range(1, ATTEMPTS + 1):
        assert put_off(0)["attempts"] == number
    assert put_off(0, spend=False)["attempts"] == ATTEMPTS
    assert put_off(10)["attempts"] == 1
    for _ in range(ATTEMPTS - 1):
        assert put_off(10)["state"] == "READY"
    assert put_off(10)["state"] == "FAILED"


def test_line_numbers_are_known_where_all_before_is_done(ledger, job):
    ledger.open(job, [ByteRange(index, index * 10, index * 10 + 10) for index in range(4)])
    for index in (0, 1, 3):
        lease = ledger.lease(job, "holder")
        while lease.range.index != index:
            lease = ledger.lease(job, "holder")
        ledger.close(lease, Tally(lines=index + 1))
    assert ledger.first_lines(job, [0, 1, 2, 3]) == {0: 0, 1: 1, 2: 3}


def test_of_many_leases_that_ran_out_some_are_freed_at_a_time_and_all_of_a_dead_holder(store, ledger, job, monkeypatch):
    monkeypatch.setattr("engine.control.ledger.EXPIRED_RANGES", 2)
    ledger.open(job, [ByteRange(index, index * 10, index * 10 + 10) for index in range(5)])
    for _ in range(5):
        ledger.lease(job, "silent")
    run_out(store, job)
    assert [len(ledger.expire()) for _ in range(4)] == [2, 2, 1, 0]
    for _ in range(5):
        ledger.lease(job, "dead")
    assert len(ledger.release(["dead"])) == 5


def test_what_was_freed_before_an_error_is_told_and_the_rest_is_freed_the_next_time(store, ledger, job, monkeypatch):
    ledger.open(job, [ByteRange(index, index * 10, index * 10 + 10) for index in range(3)])
    for _ in range(3):
        ledger.lease(job, "dead")
    real, calls = ledger._ranges, []

    class Failing:
        """The ranges, without a primary for the second range of the first `release`, and for the first of the next."""

        def __getattr__(self, name):
            return getattr(real, name)

        def find_one_and_update(self, *given, **more):
            calls.append(given)
            if len(calls) in (2, 3):
                raise NotPrimaryError("no primary")
            return real.find_one_and_update(*given, **more)

    monkeypatch.setattr(ledger, "_ranges", Failing())
    assert len(ledger.release(["dead"])) == 1
    with pytest.raises(Transient):
        ledger.release(["dead"])
    assert [len(ledger.release(["dead"])) for _ in range(2)] == [2, 0]
