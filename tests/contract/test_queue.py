"""What holds for jobs, whoever is quicker: stops, ends, retries, and only the moves in the tables. On real servers."""

import contextlib
import io
import random
import uuid
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
from pymongo.errors import AutoReconnect, NotPrimaryError
from pymongo.monitoring import CommandListener, _Listeners

from engine.control import loads
from engine.control.queue import Queue
from engine.control.store import Store, job_key
from engine.errors import Conflict, LeaseLost, Refused, Transient
from engine.model import (
    JOB_MOVES,
    RANGE_MOVES,
    ByteRange,
    Failure,
    JobOptions,
    JobState,
    RangeState,
    Stop,
    Tally,
)
from tests.contract.conftest import plan


def test_what_a_living_worker_has_forgotten_is_freed_without_a_death(store, queue, planner, ledger, source):
    [prepared] = planner.prepare([queue.submit(source, JobOptions())], "here")
    ledger.release_strays("elsewhere")
    assert ledger.lease(prepared.job.id, "other") is None
    ledger.release_strays("here")
    again = ledger.lease(prepared.job.id, "here")
    assert (again.deaths, again.number) == (0, 2)


def test_a_cancel_between_plan_and_lease_ends_with_nothing_leased(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(1), None)])
    assert queue.cancel(job.id).state is JobState.CANCELLED
    assert ledger.open_leased({job.id: ByteRange(0, 0, source.size)}, "planner") == {}
    assert ledger.summarize(job.id).leased == 0


def test_a_job_ends_only_when_no_range_of_it_is_leased(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    lease = ledger.lease(job.id, "holder")
    assert queue.cancel(job.id).state is JobState.PROCESSING
    ledger.give_back(lease, 10, Tally(lines=1, inserted=1, bytes=10))
    ended = queue.settle(job.id)
    assert (ended.state, ended.progress.tally.lines) == (JobState.CANCELLED, 1)


def test_a_job_that_is_about_to_fail_cannot_be_cancelled(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    ledger.lease(job.id, "holder")
    queue.stop(job, Stop(JobState.FAILED, Failure("timeout", "too long")))
    with pytest.raises(Conflict, match="will be FAILED"):
        queue.cancel(job.id)


def test_a_job_that_waited_for_a_range_of_a_dead_worker_alone_ends_when_that_is_freed(queue, plans, ledger, source):
    cancelled, failed = plans.fix([(queue.submit(source, JobOptions()), plan(1), None) for _ in range(2)])
    for job in (cancelled, failed):
        queue.open_ranges(job)
        ledger.lease(job.id, "dead")
    assert queue.cancel(cancelled.id).state is JobState.PROCESSING
    for freed in ledger.release(["dead"]):
        queue.freed(freed.job_id, "range 0 freed: dead died")
    assert queue.get(cancelled.id).state is JobState.CANCELLED
    assert queue.get(failed.id).state is JobState.PROCESSING
    for _ in range(2):
        ledger.lease(failed.id, "dead")
        for freed in ledger.release(["dead"]):
            queue.freed(freed.job_id, "range 0 freed: dead died")
    ended = queue.get(failed.id)
    assert (ended.state, ended.failure.code) == (JobState.FAILED, "workers_died")
    assert [event.what for event in ended.timeline].count("range 0 freed: dead died") == 3


def test_a_job_of_a_later_version_whose_ranges_are_freed_is_left_to_others(store, queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(1), None)])
    queue.open_ranges(job)
    ledger.lease(job.id, "dead")
    store.jobs.update_one({"_id": job_key(job.id)}, {"$set": {"state": "RESTING"}})
    [freed] = ledger.release(["dead"])
    queue.freed(freed.job_id, "range 0 freed: dead died")
    assert store.jobs.find_one({"_id": job_key(job.id)})["state"] == "RESTING"


def test_a_stop_of_an_earlier_round_does_not_reach_a_job_that_was_retried(queue, source):
    old = queue.submit(source, JobOptions())
    queue.cancel(old.id)
    new = queue.retry(old.id)
    queue.stop(old, Stop(JobState.FAILED, Failure("late", "from before the retry")))
    assert queue.get(new.id) == new


def test_only_engines_of_a_jobs_database_work_on_it(store, settings, queue, ledger, source):
    job = queue.submit(source, JobOptions())
    elsewhere = settings.mongo_uri.get_secret_value().replace(f"/{settings.data_db()}?", "/elsewhere?")
    other = Store(settings.model_validate(settings.model_dump() | {"mongo_uri": elsewhere}))
    assert [job.id for page in queue.open_jobs.ready() for job in page] == [job.id]
    assert list(Queue(other, ledger).open_jobs.ready()) == []
    other.close()


@pytest.mark.parametrize(
    "name", ["", "a..b", ".a", "a.", "a$b", "system.x", "a.system.b", "a\0b", "x" * 300, "$cmd", "é" * 130, "a\ud800"]
)
def test_a_collection_name_that_mongodb_does_not_take_is_refused_at_once(store, queue, source, name):
    with pytest.raises(Refused, match="use another"):
        queue.submit(source, JobOptions(name))


def test_every_write_that_a_load_depends_on_waits_for_a_majority(settings, submit, drain, monkeypatch):
    concerns = {}

    class Writes(CommandListener):
        def started(self, event):
            if event.command_name in ("insert", "update", "delete", "findAndModify"):
                where = (event.command_name, event.command[event.command_name])
                changes = event.command.get("update")
                if isinstance(changes, list) and list(changes[0].get("$set", ())) == ["planner"]:
                    where = ("claim", "jobs")
                concerns.setdefault(where, set()).add(event.command.get("writeConcern", {}).get("w"))

        def succeeded(self, event):
            pass

        failed = succeeded

    monkeypatch.setattr("pymongo.monitoring._LISTENERS", _Listeners([Writes()], [], [], [], []))
    drain(submit(b'{"n":1}\n{bad\n' * 1000, max_errors=1000).id, submit(b'{"n":1}\n' * 10**6).id)
    assert {of for of in concerns if of[1] in ("records", "rejects", "sources")} >= {("insert", "records")}
    # A claim for planning guards nothing, and what workers report only informs people: neither needs a majority.
    quick = {("claim", "jobs"): {1}, ("update", "workers"): {1}, ("update", "totals"): {1}}
    quick[("delete", "workers")] = {1}
    assert {of: concern for of, concern in concerns.items() if concern != {"majority"}} == quick


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_to_jobs_and_ranges_they_move_as_the_tables_say(
    seed, store, queue, plans, planner, ledger, source
):
    draw = random.Random(seed)
    held, moves = [], set()

    def states():
        jobs = {found["_id"]: JobState(found["state"]) for found in store.jobs.find()}
        ranges = {str(found["_id"]): RangeState(found["state"]) for found in store.ranges.find()}
        return jobs, ranges

    def any_held(speak):
        if held:
            with contextlib.suppress(LeaseLost):
                speak(held.pop(draw.randrange(len(held))))

    def planned(job):
        if job.state is JobState.PENDING:
            [job] = plans.fix([(job, plan(3), None)])
            queue.open_ranges(job)

    def leased(job):
        if (lease := ledger.lease(job.id, draw.choice("ab"))) is not None:
            held.append(lease)

    late = Failure("unavailable", "late")
    actions = (
        lambda _: queue.submit(source, JobOptions()),
        planned,
        *(leased,) * 4,
        *(lambda _: any_held(lambda lease: ledger.close(lease, Tally(lines=1, inserted=1))),) * 2,
        lambda _: any_held(lambda lease: ledger.give_back(lease, lease.confirmed, lease.tally)),
        lambda _: any_held(
            lambda lease: ledger.postpone(replace(lease, attempts=9), lease.confirmed, lease.tally, late)
        ),
        lambda _: ledger.release([draw.choice("ab")]),
        lambda job: queue.settle(job.id),
        lambda job: queue.stop(job, Stop(JobState.FAILED, late)),
        lambda job: queue.cancel(job.id),
        lambda job: queue.retry(job.id),
    )
    before = states()
    for _ in range(250):
        jobs = [queue.get(str(key)) for key in before[0]] or [queue.submit(source, JobOptions())]
        with contextlib.suppress(Conflict):
            draw.choice(actions)(draw.choice(jobs[-3:]))
        after = states()
        for table, was, now in zip((JOB_MOVES, RANGE_MOVES), before, after, strict=True):
            for key, state in was.items():
                if now[key] is not state:
                    moves.add((state, now[key]))
                    assert now[key] in table[state], f"{state} to {now[key]}"
        before = after
    assert len(moves) >= 8, moves


def test_a_job_that_is_loaded_whole_before_anybody_looks_is_completed_in_spite_of_a_stop(
    queue, planner, ledger, objects
):
    made = [objects.upload(io.BytesIO(b"{}"), f"{uuid.uuid4().hex}.json") for _ in range(2)]
    prepared = planner.prepare([queue.submit(each, JobOptions()) for each in made], "holder")
    queue.cancel(prepared[0].job.id)
    assert ledger.close_all([(each.lease, Tally(lines=1, inserted=1)) for each in prepared])
    ended = queue.finish_all([(each.job, Tally(lines=1, inserted=1)) for each in prepared])
    assert {job.id: job.state for job in ended} == {
        prepared[0].job.id: JobState.COMPLETED,  # every line was loaded before anybody saw the cancel
        prepared[1].job.id: JobState.COMPLETED,
    }


def test_a_job_whose_workers_cannot_be_woken_is_there_all_the_same(queue, submit, store, monkeypatch):
    def fail(_):
        raise AutoReconnect("gone")

    monkeypatch.setattr(store, "wakeups", SimpleNamespace(insert_one=fail))
    job = submit(b'{"n":1}\n')
    assert queue.get(job.id).state == "PENDING"


@pytest.mark.parametrize("broken", ["empty", "ordinary", "gone"])
def test_what_idle_workers_watch_is_mended_at_the_next_start(store, broken):
    store.wakeups.drop()
    if broken == "empty":
        store.control.create_collection("wakeups", capped=True, size=65536)
    elif broken == "ordinary":
        store.wakeups.insert_one({})
    store.prepare()
    assert store.wakeups.options()["capped"] is True
    assert store.wakeups.count_documents({}) >= 1


def test_a_retry_while_the_primary_steps_down_is_a_trouble_that_passes(queue, source, store, monkeypatch):
    job = queue.submit(source, JobOptions())
    queue.cancel(job.id)

    def fail(*_, **__):
        raise NotPrimaryError("stepped down")

    get = queue.get

    def get_and_fail(job_id):
        found = get(job_id)
        monkeypatch.setattr(store.jobs, "find_one", fail)
        return found

    monkeypatch.setattr(queue, "get", get_and_fail)
    with pytest.raises(Transient):
        queue.retry(job.id)


def test_the_time_a_job_lay_ended_before_its_retry_is_not_of_its_work(queue, plans, source, store):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.cancel(job.id)
    minute = timedelta(seconds=60)
    ended = queue.get(job.id)
    store.jobs.update_one(
        {"_id": job_key(job.id)},
        {"$set": {"startedAt": ended.started_at - minute, "finishedAt": ended.finished_at - minute}},
    )
    assert 59 < queue.retry(job.id).idle_seconds < 90


@pytest.mark.parametrize("other", ["none", "planned", "begun"])
def test_a_job_that_is_retried_counts_what_others_have_loaded_since_as_theirs(queue, plans, ledger, source, other):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.cancel(job.id)
    if other != "none":
        [second] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
        queue.open_ranges(second)
        if other == "begun":
            assert ledger.lease(second.id, "holder")
    assert queue.retry(job.id).plan.sole is (other != "begun")


def test_loads_that_were_skipped_hide_no_other_from_a_job_that_is_retried(queue, plans, ledger, source, monkeypatch):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.cancel(job.id)
    [second] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(second)
    assert ledger.lease(second.id, "holder")
    monkeypatch.setattr(loads, "OTHERS", 2)
    for _ in range(2):
        plans.complete_unread(queue.submit(source, JobOptions(if_loaded="skip")), plan(2), second.id)
    assert queue.retry(job.id).plan.sole is False


def test_a_job_beside_one_that_may_be_retried_does_not_count_its_documents(queue, planner, source):
    [first] = planner.prepare([queue.submit(source, JobOptions())], "holder")
    queue.cancel(first.job.id)
    [second] = planner.prepare([queue.submit(source, JobOptions())], "holder")
    assert (first.job.plan.sole, second.job.plan.sole) == (True, False)
