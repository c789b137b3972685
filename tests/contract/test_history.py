"""The history of jobs: what was loaded before, the deletion of old jobs, counts, and batches. On real servers."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from bson import Int64

from api.views import batch_status
from engine.control.history import History
from engine.control.job_batches import JobBatches
from engine.control.retention import Retention
from engine.control.store import job_key
from engine.errors import Conflict, Transient
from engine.model import Failure, JobOptions, JobState, RangeState, Tally
from tests.contract.conftest import loaded, plan


def test_a_second_load_is_told_of_the_first_before_and_after_its_history_is_pruned(
    store, queue, planner, ledger, source
):
    first = loaded(planner, queue, ledger, source)
    assert first.state is JobState.COMPLETED
    store.data["records"].insert_one({})
    second = loaded(planner, queue, ledger, source)
    assert (second.already_loaded_by, second.plan.sole, second.plan.tag) == (first.id, False, first.plan.tag)
    skipped = loaded(planner, queue, ledger, source, if_loaded="skip")
    assert (skipped.state, skipped.already_loaded_by) == (JobState.COMPLETED, second.id)
    store.jobs.update_many({}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    assert Retention(store, ledger).prune(30, 9) == 3
    again = loaded(planner, queue, ledger, source, if_loaded="skip")
    assert (again.already_loaded_by, again.plan.tag) == (second.id, first.plan.tag)
    assert loaded(planner, queue, ledger, source, collection="other", if_loaded="skip").already_loaded_by is None


def test_a_load_that_did_not_complete_is_not_taken_for_one(store, queue, planner, ledger, source):
    [prepared] = planner.prepare([queue.submit(source, JobOptions())], "holder")
    ledger.give_back(prepared.lease, 0, Tally())
    queue.cancel(prepared.job.id)
    store.data["records"].insert_one({})
    second = loaded(planner, queue, ledger, source, if_loaded="skip")
    assert (second.already_loaded_by, second.plan.sole, second.progress.tally.lines) == (None, False, 1)


def test_a_job_that_was_retried_since_is_not_pruned(store, queue, source):
    job = queue.submit(source, JobOptions())
    queue.cancel(job.id)
    store.jobs.update_many({}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    real = store.jobs.update_one

    class Late:
        """The jobs; between the look for old ones and the first write, somebody retries this one and it ends again."""

        def __getattr__(self, name):
            return getattr(store.jobs, name)

        def update_one(self, *given, **more):
            queue.retry(job.id)
            queue.cancel(job.id)
            return real(*given, **more)

    late = Retention(SimpleNamespace(jobs=Late(), batches=store.batches), queue._ledger)
    assert late.prune(30, 9) == 0
    assert queue.get(job.id).state is JobState.CANCELLED


def test_jobs_that_are_old_are_found_by_their_index_however_many_have_ended(store, queue, ledger, source):
    for _ in range(40):
        queue.cancel(queue.submit(source, JobOptions()).id)
    old = [found["_id"] for found in store.jobs.find().limit(5)]
    store.jobs.update_many({"_id": {"$in": old}}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    store.jobs.update_one(
        {"_id": old[0]}, [{"$set": {"pruned": True, "finishedAt": "$$NOW"}}]
    )  # its deletion was begun under other settings
    store.control.command("profile", 2)
    retention = Retention(store, ledger)
    assert (retention.prune(30, 3), retention.prune(30, 9), retention.prune(30, 9)) == (3, 2, 0)
    store.control.command("profile", 0)
    looks = list(
        store.control["system.profile"].find({"op": "query", "ns": store.jobs.full_name, "command.hint": {"$ne": None}})
    )
    assert looks
    assert max(look["docsExamined"] for look in looks) <= 5
    assert store.jobs.count_documents({}) == 35


def test_a_job_whose_history_is_being_deleted_cannot_be_retried(store, queue, source):
    job = queue.submit(source, JobOptions())
    queue.cancel(job.id)
    store.jobs.update_one({"_id": job_key(job.id)}, {"$set": {"pruned": True}})
    with pytest.raises(Conflict, match="being deleted"):
        queue.retry(job.id)


def test_one_job_that_cannot_be_deleted_leaves_the_others_to_be(store, queue, ledger, source, monkeypatch):
    for _ in range(3):
        queue.cancel(queue.submit(source, JobOptions()).id)
    store.jobs.update_many({}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    bad = str(store.jobs.find_one({}, sort=[("_id", 1)])["_id"])
    real = ledger.delete

    def fail(job_id):
        if job_id == bad:
            raise Transient("too many ranges for now")
        real(job_id)

    monkeypatch.setattr(ledger, "delete", fail)
    assert Retention(store, ledger).prune(30, 9) == 2
    monkeypatch.undo()
    assert Retention(store, ledger).prune(30, 9) == 0  # it is tried again a minute later
    store.jobs.update_one({}, [{"$set": {"prunedAt": {"$subtract": ["$$NOW", 61_000]}}}])
    assert Retention(store, ledger).prune(30, 9) == 1
    assert store.jobs.count_documents({}) == 0


def test_ranges_that_are_all_put_off_tell_why(store, queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    history, failure = History(store), Failure("transient", "S3 is away")
    assert history.ranges(job.id).put_off is None
    first = ledger.lease(job.id, "w1")
    ledger.postpone(replace(first, attempts=3), first.confirmed, first.tally, failure)
    assert history.ranges(job.id).put_off is None  # the other range need not wait
    second = ledger.lease(job.id, "w1")
    assert history.ranges(job.id).put_off == "S3 is away"  # the other range is LEASED, and no longer counts
    ledger.postpone(replace(second, attempts=3), second.confirmed, second.tally, Failure("transient", "S3 is slow"))
    assert history.ranges(job.id).put_off in ("S3 is away", "S3 is slow")
    store.ranges.update_many({}, [{"$set": {"notBefore": "$$NOW"}}])
    assert history.ranges(job.id).put_off is None


def test_leases_of_a_host_that_died_are_kept_by_nobody(store, queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    ledger.lease(job.id, "w1"), ledger.lease(job.id, "w2")
    assert (History(store).ranges(job.id).states, History(store).ranges(job.id).kept) == ({RangeState.LEASED: 2}, 2)
    store.ranges.update_one({"holder": "w1"}, [{"$set": {"until": {"$subtract": ["$$NOW", 1000]}}}])
    assert History(store).ranges(job.id).kept == 1


def test_a_count_of_jobs_that_hangs_keeps_nobody_else(store, queue, source, monkeypatch):
    history, hanging, go_on = History(store), threading.Event(), threading.Event()
    real = history._count

    def hang():
        hanging.set()
        go_on.wait(30)
        return real()

    monkeypatch.setattr("engine.control.history.FIRST_SECONDS", 0.05)
    monkeypatch.setattr("engine.control.history.NEXT_SECONDS", 0.05)
    monkeypatch.setattr("engine.control.history.BACKLOG_FACTOR", 0)
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(history, "_count", hang)
        first = pool.submit(history.backlog)
        hanging.wait(30)
        with pytest.raises(Transient, match="counted for the first time"):
            history.backlog()
        go_on.set()
        assert first.result().states[JobState.PENDING] == 0
        hanging.clear(), go_on.clear()
        queue.submit(source, JobOptions())
        second = pool.submit(history.backlog)
        hanging.wait(30)
        assert history.backlog().states[JobState.PENDING] == 0
        go_on.set()
        assert second.result().states[JobState.PENDING] == 1


def test_who_asks_while_another_counts_is_told_of_no_older_count(store, queue, source, monkeypatch):
    history, counting = History(store), threading.Event()
    monkeypatch.setattr("engine.control.history.CHEAP_SECONDS", 60)
    monkeypatch.setattr("engine.control.history.NEXT_SECONDS", 60)
    assert history.backlog().states[JobState.PENDING] == 0
    queue.submit(source, JobOptions())
    real = history._count

    def slow():
        counting.set()
        time.sleep(0.1)
        return real()

    monkeypatch.setattr(history, "_count", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(history.backlog)
        assert counting.wait(30)
        assert history.backlog().states[JobState.PENDING] == 1
        assert first.result().states[JobState.PENDING] == 1


def test_a_count_of_jobs_that_takes_long_is_not_made_at_every_call(store, queue, source, monkeypatch):
    history = History(store)
    monkeypatch.setattr("engine.control.history.CHEAP_SECONDS", 60)
    queue.submit(source, JobOptions())
    assert history.backlog().states[JobState.PENDING] == 1
    queue.submit(source, JobOptions(run_at=datetime(2099, 1, 1, tzinfo=UTC)))
    assert history.backlog().states[JobState.PENDING] == 2
    monkeypatch.setattr("engine.control.history.CHEAP_SECONDS", 0.0)
    monkeypatch.setattr("engine.control.history.BACKLOG_FACTOR", 1e9)
    assert history.backlog().states[JobState.PENDING] == 2
    queue.submit(source, JobOptions())
    assert history.backlog().states[JobState.PENDING] == 2


def test_a_job_whose_time_has_come_counts_as_waiting_where_no_worker_lets_it_in(store, queue, source):
    queue.submit(source, JobOptions(run_at=datetime(2099, 1, 1, tzinfo=UTC)))
    assert History(store).backlog().oldest_seconds == 0
    ago = {"$subtract": ["$$NOW", 60_000]}
    store.jobs.update_one({}, [{"$set": {"notBefore": ago, "options.runAt": ago, "createdAt": ago}}])
    assert History(store).backlog().oldest_seconds >= 60
    assert queue.admit_due(10) == 1
    assert History(store).backlog().oldest_seconds >= 60


def test_a_request_for_a_batch_that_died_within_is_told_as_failed_when_nobody_repeats_it(store, queue, source):
    batches = JobBatches(store)
    batch = batches.submit([source], JobOptions())
    store.jobs.delete_many({})
    assert batch_status(batches.get(batch.id))["status"] == "PROCESSING"
    store.batches.update_one({}, [{"$set": {"createdAt": {"$subtract": ["$$NOW", 7_200_000]}}}])
    assert batch_status(batches.get(batch.id))["status"] == "FAILED"


def test_the_rejects_of_an_old_job_go_slice_by_slice_and_one_worker_at_a_time(
    store, queue, ledger, source, monkeypatch
):
    monkeypatch.setattr("engine.control.store.SLICE", 10)
    old, kept = (queue.submit(source, JobOptions(validate=True)) for _ in range(2))
    queue.cancel(old.id)
    for job in (old, kept):
        key = job_key(job.id)
        store.rejects.insert_many([{"_id": {"job": key, "offset": Int64(number)}} for number in range(25)])
        store.claims.insert_many([{"_id": {"job": key, "what": "id", "value": number}} for number in range(15)])
    store.jobs.update_one({"_id": job_key(old.id)}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    retention, other = (Retention(store, ledger) for _ in range(2))
    left: list[int] = []

    def goes_on():
        """Called after each slice; stops after the second, with rejects left."""
        left.append(store.rejects.count_documents({}))
        if len(left) == 1:
            assert other.prune(30, 9) == 0  # another worker is deleting this job
        return len(left) < 2

    assert retention.prune(30, 9, goes_on) == 1
    assert left == [40, 30]
    assert other.prune(30, 9) == 1
    assert retention.prune(30, 9) == 0
    for collection, count in ((store.rejects, 25), (store.claims, 15), (store.jobs, 1)):
        assert collection.count_documents({}) == count


def test_a_job_that_is_tried_again_has_waited_since_then(store, queue, source):
    job = queue.submit(source, JobOptions())
    queue.cancel(job.id)
    store.jobs.update_one({}, [{"$set": {"createdAt": {"$subtract": ["$$NOW", 3_600_000]}}}])
    queue.retry(job.id)
    assert History(store).backlog().oldest_seconds < 600
    store.jobs.update_one({}, [{"$set": {"retriedAt": {"$subtract": ["$$NOW", 1_800_000]}}}])
    assert 1800 <= History(store).backlog().oldest_seconds < 2400


def test_a_job_of_a_later_version_hides_no_other_from_those_who_ask(store, queue, source):
    jobs = [queue.submit(source, JobOptions()) for _ in range(5)]
    strange = ({"state": "RESTING"}, {"options.format": "parquet"}, {"options.priority": "high"})
    for job, news in zip(jobs[1:4], strange, strict=True):
        store.jobs.update_one({"_id": job_key(job.id)}, {"$set": news})
    history = History(store)
    assert [job.id for job in history.page(2)] == [jobs[4].id, jobs[0].id]
    assert [job.id for page in queue.open_jobs.ready() for job in page] == [jobs[0].id, jobs[4].id]
    assert history.backlog().states[JobState.PENDING] == 4
    queue.cancel(jobs[0].id)
    queue.cancel(jobs[4].id)
    with pytest.raises(Conflict, match="a later version"):
        history.open_job_of(source.bucket, source.key)
    for job in jobs[1:4]:
        with pytest.raises(Conflict, match=f"{job.id} was made by a later version"):
            queue.get(job.id)


def test_a_batch_whose_last_job_was_deleted_by_a_process_that_died_over_it_is_gone(
    store, queue, ledger, source, monkeypatch
):
    batch = JobBatches(store).submit([source], JobOptions())
    [job] = History(store).page(9, batch=batch.id)
    queue.cancel(job.id)
    store.jobs.update_many({}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    real, retention = store.jobs.delete_one, Retention(store, ledger)

    def delete_one(query):
        real(query)
        raise SystemExit

    monkeypatch.setattr(store.jobs, "delete_one", delete_one)
    with pytest.raises(SystemExit):
        retention.prune(30, 9)
    assert store.batches.count_documents({}) == 0
