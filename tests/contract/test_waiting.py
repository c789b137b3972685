"""Jobs and ranges that wait for a time: workers pass over them before it, and see all of them after. On real servers."""

import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from bson import ObjectId

from engine.control.store import job_key
from engine.fleet.chooser import Chooser
from engine.model import Failure, JobOptions, JobState, Stop, Tally
from tests.contract.conftest import plan


def test_a_job_that_is_stopped_while_it_is_put_off_is_seen_at_once(store, queue, source):
    job = queue.submit(source, JobOptions())
    stamp = {"stopping": {"to": "FAILED", "failure": None}, "notBefore": datetime(2099, 1, 1, tzinfo=UTC)}
    store.jobs.update_one({}, {"$set": stamp})
    assert [[found.id for found in page] for page in queue.open_jobs.ready()] == [[job.id]]


def test_a_job_whose_ranges_are_all_put_off_is_passed_over_until_one_is_due(
    queue, plans, planner, ledger, source, store
):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    for _ in range(2):
        lease = ledger.lease(job.id, "other")
        ledger.postpone(replace(lease, attempts=3), lease.confirmed, lease.tally, Failure("unavailable", "away"))
    chooser = Chooser(queue, plans, ledger, planner, "here", threading.Event(), lambda: None)
    asked = []
    real = ledger.lease
    ledger.lease = lambda *given, **how: asked.append(given) or real(*given, **how)
    for _ in range(5):
        chooser._looked_at = 0
        assert chooser.take() == []
    assert len(asked) == 1
    fresh = queue.submit(source, JobOptions())
    chooser._looked_at = 0
    assert [run.job.id for run in chooser.take()] == [fresh.id]
    queue.cancel(job.id)
    store.ranges.update_many({"job": job_key(job.id)}, {"$unset": {"notBefore": "", "waiting": ""}})
    queue.retry(job.id)  # a new round: what was known about the job no longer holds
    chooser._looked_at = 0
    assert [run.job.id for run in chooser.take()] == [job.id]


@pytest.mark.parametrize("paused", [False, True])
def test_a_job_of_which_nothing_is_left_to_do_is_brought_to_its_end(queue, plans, planner, ledger, source, paused):
    done, open_one = plans.fix([(queue.submit(source, JobOptions(collection=name)), plan(1), None) for name in "ab"])
    for job in (done, open_one):
        queue.open_ranges(job)
    ledger.close(ledger.lease(done.id, "who died over it"), Tally())
    if paused:
        queue.pause()
    chooser = Chooser(queue, plans, ledger, planner, "here", threading.Event(), lambda: None)
    taken = chooser.take()
    assert [run.job.id for run in taken] == ([] if paused else [open_one.id])
    chooser._looked_at = 0
    chooser.take()
    assert [queue.get(job.id).state for job in (done, open_one)] == [JobState.COMPLETED, JobState.PROCESSING]


def test_ranges_that_others_hold_are_looked_for_soon_and_those_put_off_in_their_time(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    assert ledger.idle_seconds(job.id, 60) is None
    queue.open_ranges(job)
    assert ledger.idle_seconds(job.id, 60) == 0
    first, second = ledger.lease(job.id, "a"), ledger.lease(job.id, "b")
    assert ledger.idle_seconds(job.id, 60) == 1
    ledger.postpone(replace(first, attempts=2), 0, Tally(), Failure("unavailable", "away"))
    assert ledger.idle_seconds(job.id, 60) == 1
    ledger.close(second, Tally())
    assert 60 < ledger.idle_seconds(job.id, 1e6) < 90
    assert ledger.idle_seconds(job.id, 5) == 5


LATER = datetime(2099, 1, 1, tzinfo=UTC)


def seen(queue):
    return {job.id for page in queue.open_jobs.ready() for job in page}


def looks(store, look):
    """The most index keys, and the most documents, that the server examined for any query of jobs in `look`."""
    store.control.command("profile", 2)
    look()
    store.control.command("profile", 0)
    found = list(store.control["system.profile"].find({"op": "query", "ns": store.jobs.full_name}))
    store.control["system.profile"].drop()
    assert found
    return max(each["keysExamined"] for each in found), max(each["docsExamined"] for each in found)


def test_jobs_that_wait_for_their_time_cost_the_others_nothing(store, queue, source):
    for _ in range(100):
        queue.submit(source, JobOptions(priority=5, run_at=LATER))
    job = queue.submit(source, JobOptions(run_at=datetime(2020, 1, 1, tzinfo=UTC)))
    keys, documents = looks(store, lambda: seen(queue))
    assert (keys <= 3, documents) == (True, 1)
    keys, documents = looks(store, lambda: queue.admit_due(1000))
    assert (keys <= 1, documents) == (True, 0)
    assert seen(queue) == {job.id}


def test_jobs_whose_time_has_come_are_let_in_the_earliest_first(store, queue, source):
    jobs = [queue.submit(source, JobOptions(run_at=LATER)) for _ in range(4)]
    for job, minutes in zip(jobs, (3, 1, 2, -1), strict=True):
        at = {"$subtract": ["$$NOW", 60_000 * minutes]}
        store.jobs.update_one({"_id": ObjectId(job.id)}, [{"$set": {"notBefore": at}}])
    assert queue.admit_due(2) == 2
    assert seen(queue) == {jobs[0].id, jobs[2].id}
    assert (queue.admit_due(2), queue.admit_due(2)) == (1, 0)
    assert seen(queue) == {job.id for job in jobs[:3]}


def test_a_job_that_is_put_off_waits_and_is_seen_when_it_is_stopped(store, queue, plans, source):
    job = queue.submit(source, JobOptions())
    plans.postpone(job, Failure("unreachable", "S3 does not answer"))
    assert store.jobs.find_one({}, {"waiting": 1})["waiting"] is True
    assert seen(queue) == set()
    stamp = Stop(JobState.FAILED, Failure("timeout", "too late"))
    assert (queue.stop(job, stop=stamp), queue.get(job.id).state) == (None, JobState.FAILED)
    assert "waiting" not in store.jobs.find_one({})
    queue.retry(job.id)
    assert seen(queue) == {job.id}


def test_a_job_that_is_being_stopped_is_put_off_no_more(store, queue, plans, source):
    job = queue.submit(source, JobOptions())
    store.jobs.update_one({}, {"$set": {"stopping": {"to": "CANCELLED", "failure": None}}})
    plans.postpone(job, Failure("unreachable", "S3 does not answer"))
    assert seen(queue) == {job.id}
    assert queue.settle(job.id).state is JobState.CANCELLED


def test_a_retry_waits_again_for_the_time_that_the_job_was_given(queue, source):
    job = queue.submit(source, JobOptions(run_at=LATER))
    queue.cancel(job.id)
    assert queue.retry(job.id).state is JobState.PENDING
    assert seen(queue) == set()


def test_a_job_that_was_put_off_since_it_was_seen_is_claimed_by_nobody(store, queue, plans, source):
    job = queue.submit(source, JobOptions())
    [claimed] = plans.claim([job], "one")
    plans.postpone(claimed, Failure("unreachable", "S3 does not answer"))
    assert plans.claim([job], "other") == []
    # As if put off by an older version, which does not know the flag.
    store.jobs.update_one({}, {"$unset": {"waiting": ""}, "$set": {"notBefore": LATER}})
    assert plans.claim([job], "other") == []
    plans.postpone(claimed, Failure("unreachable", "S3 does not answer"))
    assert queue.get(job.id).attempts == 1


def test_a_plan_ends_all_waiting(store, queue, plans, source):
    job = queue.submit(source, JobOptions(run_at=LATER))
    plans.fix([(job, plan(1), None)])
    found = store.jobs.find_one({})
    assert (found["state"], "waiting" in found, "notBefore" in found) == ("PROCESSING", False, False)


def test_jobs_that_another_is_about_to_plan_are_not_looked_at(store, queue, plans, source):
    theirs, free, stopped = (queue.submit(source, JobOptions()) for _ in range(3))
    plans.claim([theirs, stopped], "other")
    store.jobs.update_one({"_id": ObjectId(stopped.id)}, {"$set": {"stopping": {"to": "CANCELLED", "failure": None}}})
    assert [job.id for page in queue.open_jobs.ready("me") for job in page] == [free.id, stopped.id]
    assert [job.id for page in queue.open_jobs.ready("other") for job in page] == [theirs.id, free.id, stopped.id]
    store.jobs.update_one({"_id": ObjectId(theirs.id)}, [{"$set": {"planner.until": "$$NOW"}}])
    assert seen(queue) == {theirs.id, free.id, stopped.id}


def test_a_job_whose_ranges_are_all_done_or_held_is_left_to_its_holders(queue, plans, planner, ledger, rollup, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(3), None)])
    queue.open_ranges(job)
    ledger.close(ledger.lease(job.id, "other"), Tally(lines=1, inserted=1))
    held = [ledger.lease(job.id, "other") for _ in range(2)]
    rollup.tend(job.id)
    chooser = Chooser(queue, plans, ledger, planner, "here", threading.Event(), lambda: None)
    assert (chooser.take(), chooser.tried) == ([], 0)
    ledger.give_back(held[0], 0, Tally())
    chooser._looked_at = 0
    [run] = chooser.take()
    assert run.job.id == job.id
    for lease in (held[1], run.lease):
        ledger.close(lease, Tally(lines=1, inserted=1))
    # Now nobody holds a range, and the job is to be ended.
    chooser._looked_at = 0
    assert chooser.take() == []
    assert queue.get(job.id).state is JobState.COMPLETED


def test_a_look_ahead_leases_one_range_and_leaves_what_is_to_be_planned(queue, plans, planner, ledger, source):
    chooser = Chooser(queue, plans, ledger, planner, "here", threading.Event(), lambda: None)
    [job] = plans.fix([(queue.submit(source, JobOptions(priority=5)), plan(2), None)])
    queue.open_ranges(job)
    [held] = chooser.take()
    [ahead] = chooser.take(ahead=True)
    assert (held.job.id, held.ahead) == (job.id, False)
    assert (ahead.job.id, ahead.ahead) == (job.id, True)
    first = queue.submit(source, JobOptions(priority=9, collection="other"))
    ledger.give_back(ahead.lease, 0, Tally())
    chooser._looked_at = 0
    assert chooser.take(ahead=True) == []  # the job that has to be planned comes first
    assert queue.get(first.id).state is JobState.PENDING
    chooser._looked_at = 0
    [run] = chooser.take()
    assert (run.job.id, run.ahead) == (first.id, False)


def test_a_look_ahead_frees_nothing_and_takes_nothing_in_doubt_or_while_the_queue_is_paused(
    queue, plans, planner, ledger, source
):
    chooser = Chooser(queue, plans, ledger, planner, "here", threading.Event(), lambda: None)
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    [held] = chooser.take()
    chooser.suspect_strays()
    assert chooser.take(ahead=True) == []
    ledger.renew(held.lease, 0, Tally())
    ledger.close(held.lease, Tally(lines=1, inserted=1))
    chooser.release_strays()
    queue.pause()
    assert chooser.take(ahead=True) == []
    queue.resume()
    assert [run.ahead for run in chooser.take(ahead=True)] == [True]


def test_a_job_that_is_cancelled_while_a_range_of_it_is_leased_ends_and_is_not_worked_on(
    queue, plans, planner, ledger, source, monkeypatch
):
    chooser = Chooser(queue, plans, ledger, planner, "here", threading.Event(), lambda: None)
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    lease = ledger.lease

    def leased(*given, **more):
        found = lease(*given, **more)
        queue.cancel(job.id)
        return found

    monkeypatch.setattr(ledger, "lease", leased)
    assert chooser.take() == []
    assert ledger.summarize(job.id).leased == 0
    assert queue.get(job.id).state is JobState.CANCELLED
