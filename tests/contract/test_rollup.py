"""What the holders of a job's ranges learn of it at each renewal, and the sums of its numbers. On real servers."""

import time

import pytest

from engine.control.rollup import ROLL_UP_MS
from engine.control.store import job_key
from engine.model import JobOptions, JobState, Tally
from tests.contract.conftest import plan


@pytest.fixture
def running(queue, plans, source):
    """Makes a job with these options and two ranges."""

    def make(**options):
        [job] = plans.fix([(queue.submit(source, JobOptions(**options)), plan(2), None)])
        queue.open_ranges(job)
        return job

    return make


def put(store, job, **fields):
    """Set fields of a job to expressions."""
    store.jobs.update_one({"_id": job_key(job.id)}, [{"$set": fields}])


def test_numbers_are_summed_when_they_are_old_and_not_before(store, queue, ledger, rollup, running):
    job = running()
    ledger.close(ledger.lease(job.id, "holder"), Tally(lines=3, inserted=3, bytes=30))
    assert rollup.tend(job.id) is False
    first = queue.get(job.id).progress
    assert (first.tally.lines, first.ranges_done, first.ranges_total) == (3, 1, 2)
    ledger.close(ledger.lease(job.id, "holder"), Tally(lines=4, inserted=4, bytes=40))
    began = time.monotonic()
    put(store, job, rolledAt="$$NOW")
    assert rollup.tend(job.id) is False
    summed_again = queue.get(job.id).progress != first
    assert not summed_again or time.monotonic() - began > ROLL_UP_MS / 1000  # on a machine that is very busy
    put(store, job, rolledAt={"$subtract": ["$$NOW", 10_000]})
    assert rollup.tend(job.id) is False
    assert queue.get(job.id).progress.tally == Tally(lines=7, inserted=7, bytes=70)


def test_numbers_are_summed_on_after_a_primary_whose_clock_was_ahead(store, queue, rollup, running):
    job = running()
    put(store, job, rolledAt={"$add": ["$$NOW", 3_600_000]})
    assert rollup.tend(job.id) is False
    assert queue.get(job.id).progress.at is not None
    assert store.jobs.count_documents({"$expr": {"$lte": ["$rolledAt", "$$NOW"]}}) == 1


def test_a_sum_over_ranges_of_which_some_are_missing_is_of_all_that_are_planned(store, queue, rollup, running):
    """Others may load the first ranges while the planner still inserts the last ones."""
    job = running()
    store.ranges.delete_one({"_id.index": 1})
    assert rollup.tend(job.id) is False
    progress = queue.get(job.id).progress
    assert (progress.at is not None, progress.ranges_total) == (True, 2)


def test_a_job_with_too_many_rejects_is_stopped_by_whoever_sums_them(queue, ledger, rollup, running):
    job = running(max_errors=1)
    ledger.close(ledger.lease(job.id, "holder"), Tally(lines=3, inserted=1, rejected=2, bytes=30))
    held = ledger.lease(job.id, "holder")
    assert rollup.tend(job.id) is False
    stopping = queue.get(job.id).stopping
    assert (stopping.to, stopping.failure.code) == (JobState.FAILED, "too_many_errors")
    assert rollup.tend(job.id) is True
    ledger.give_back(held, 0, Tally())
    assert queue.settle(job.id).state is JobState.FAILED


def test_the_holders_learn_that_a_job_is_over_its_time(store, queue, ledger, rollup, running):
    job = running(timeout_seconds=1000)
    assert ledger.lease(job.id, "holder")
    assert rollup.tend(job.id) is False
    put(store, job, deadline={"$subtract": ["$$NOW", 1]})
    assert rollup.tend(job.id) is True
    stopping = queue.get(job.id).stopping
    assert (stopping.to, stopping.failure.code) == (JobState.FAILED, "timeout")
    assert rollup.tend(job.id) is True


def test_the_holders_learn_that_a_job_is_stopped_has_ended_or_is_gone(store, queue, ledger, rollup, running):
    job = running()
    held = ledger.lease(job.id, "holder")
    queue.cancel(job.id)
    assert queue.get(job.id).state is JobState.PROCESSING
    assert rollup.tend(job.id) is True
    ledger.give_back(held, 0, Tally())
    assert queue.settle(job.id).state is JobState.CANCELLED
    assert rollup.tend(job.id) is True
    store.jobs.delete_one({"_id": job_key(job.id)})
    assert rollup.tend(job.id) is True
