"""What holds of jobs whoever is quicker: plans, claims, stops, ends, retries and the memory of what was loaded."""

import contextlib
import io
import random
import threading
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect
from pymongo.monitoring import CommandListener, _Listeners

from api.views import batch_status
from engine.chooser import Chooser
from engine.errors import Conflict, LeaseLost, Refused, Transient
from engine.history import History
from engine.job_batches import JobBatches
from engine.ledger import DEATHS, VANISHED
from engine.model import (
    JOB_MOVES,
    RANGE_MOVES,
    ByteRange,
    Failure,
    Format,
    JobOptions,
    JobState,
    Plan,
    RangeState,
    Stop,
    Tally,
)
from engine.planner import Planner
from engine.plans import Plans
from engine.queue import Queue
from engine.retention import Retention
from engine.store import Store, job_key


@pytest.fixture
def source(objects):
    return objects.upload(io.BytesIO(b'{"n":1}\n' * 100), f"{uuid.uuid4().hex}.ndjson")


@pytest.fixture
def plans(store, queue, ledger):
    return Plans(store, queue, ledger)


@pytest.fixture
def planner(store, queue, plans, ledger, objects, settings):
    return Planner(store, queue, plans, ledger, objects, settings)


def plan(ranges, tag=b"tagtag"):
    return Plan(Format.NDJSON, tag, 100, ranges, True, 2**25)


def test_the_first_plan_holds(queue, plans, source):
    job = queue.submit(source, JobOptions())
    other = queue.submit(source, JobOptions())
    [first] = plans.fix([(job, plan(2), None)])
    second, _ = plans.fix([(job, plan(5), None), (other, plan(1), None)])
    assert second.plan == first.plan == plan(2)


def test_one_worker_at_a_time_is_about_to_plan_a_job_and_a_dead_one_makes_room(queue, plans, source):
    job = queue.submit(source, JobOptions())
    others = [queue.submit(source, JobOptions()) for _ in range(2)]
    claimed = plans.claim([job, others[0]], "first")
    assert [claimed_job.id for claimed_job in claimed] == [job.id, others[0].id]
    assert [claimed_job.id for claimed_job in plans.claim([job, *others], "second")] == [others[1].id]
    plans.disclaim(["first"])
    assert [claimed_job.id for claimed_job in plans.claim([job, others[1]], "third")] == [job.id]


def test_a_job_over_whose_plan_workers_die_is_stopped(queue, plans, source):
    job = queue.submit(source, JobOptions())
    for number in range(DEATHS):
        assert plans.claim([job], f"dead {number}")
        plans.disclaim([f"dead {number}"])
    assert not plans.claim([job], "next")
    job = queue.get(job.id)
    assert (job.state, job.failure.code) == (JobState.FAILED, "workers_died")


def test_a_claim_whose_answer_was_lost_is_had_by_claiming_again(queue, plans, source):
    job = queue.submit(source, JobOptions())
    for _ in range(DEATHS + 2):
        [claimed] = plans.claim([job], "holder")
    assert claimed.planner_deaths == 0


def test_claims_that_lapse_may_be_of_some_who_only_wait(store, queue, plans, source):
    """They count, but not as deaths do: it takes more of them, and from the first on the job goes alone."""
    job = queue.submit(source, JobOptions())
    for number in range(VANISHED):
        [claimed] = plans.claim([job], f"slow {number}")
        assert claimed.planner_deaths == number
        store.jobs.update_many({}, [{"$set": {"planner.until": "$$NOW"}}])
    assert not plans.claim([job], "next")
    assert queue.get(job.id).failure.code == "workers_died"


def test_a_job_that_ended_while_it_was_planned_stays_as_it_is(queue, plans, planner, ledger, source, monkeypatch):
    first = loaded(planner, queue, ledger, source)
    job = queue.submit(source, JobOptions(if_loaded="load"))
    real = planner._register

    def register(drafts):
        """Others are quicker, and skip it."""
        found = real(drafts)
        plans.complete_unread(job, replace(first.plan, sole=False), first.id)
        return found

    monkeypatch.setattr(planner, "_register", register)
    [prepared] = planner.prepare([job], "late")
    assert (prepared.lease, prepared.job.state) == (None, JobState.COMPLETED)
    stale = replace(prepared.job, plan=first.plan)
    assert queue.finish(stale, Tally(lines=1, rejected=9999)).state is JobState.COMPLETED
    assert queue.get(job.id).failure is None


def test_an_object_that_s3_does_not_show_in_time_holds_up_nobody(
    queue, plans, ledger, store, objects, settings, source
):
    class Hung:
        def __init__(self):
            self.let_go = threading.Event()

        def open(self, found, start, stop):
            if found.key == source.key:
                self.let_go.wait(30)
            return objects.open(found, start, stop)

    hung, moves = Hung(), []
    quick = settings.model_copy(update={"engine_lease_seconds": 3.0})
    planner = Planner(store, queue, plans, ledger, hung, quick, lambda: moves.append(1))
    others = [objects.upload(io.BytesIO(b"{}"), f"{uuid.uuid4().hex}.json") for _ in range(3)]
    jobs = [queue.submit(each, JobOptions()) for each in (source, *others)]
    found = {each.job.id: each for each in planner.prepare(jobs, "holder")}
    hung.let_go.set()
    assert isinstance(found[jobs[0].id].error, Transient)
    assert all(found[job.id].lease for job in jobs[1:])
    assert moves


def test_a_job_that_is_stopped_while_it_is_put_off_is_seen_at_once(store, queue, source):
    job = queue.submit(source, JobOptions())
    stamp = {"stopping": {"to": "FAILED", "failure": None}, "notBefore": datetime(2099, 1, 1, tzinfo=UTC)}
    store.jobs.update_one({}, {"$set": stamp})
    assert [[found.id for found in page] for page in queue.open_jobs()] == [[job.id]]


def test_what_a_living_worker_has_forgotten_is_freed_without_a_death(store, queue, planner, ledger, source):
    [prepared] = planner.prepare([queue.submit(source, JobOptions())], "here")
    ledger.forsake("elsewhere")
    assert ledger.lease(prepared.job.id, "other") is None
    ledger.forsake("here")
    again = ledger.lease(prepared.job.id, "here")
    assert (again.deaths, again.number) == (0, 2)


def test_a_cancel_between_plan_and_lease_ends_with_nothing_leased(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(1), None)])
    assert queue.cancel(job.id).state is JobState.CANCELLED
    assert ledger.open_leased({job.id: ByteRange(0, 0, source.size)}, "planner") == {}
    assert ledger.sum(job.id).leased == 0


def test_a_job_ends_only_when_no_range_of_it_is_leased(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(2), None)])
    queue.open_ranges(job)
    lease = ledger.lease(job.id, "holder")
    assert queue.cancel(job.id).state is JobState.PROCESSING
    ledger.give_back(lease, 10, Tally(lines=1, inserted=1, bytes=10))
    ended = queue.settle(job.id)
    assert (ended.state, ended.progress.tally.lines) == (JobState.CANCELLED, 1)


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
    assert [job.id for page in queue.open_jobs() for job in page] == [job.id]
    assert list(Queue(other, ledger).open_jobs()) == []
    other.close()


@pytest.mark.parametrize(
    "name", ["", "a..b", ".a", "a.", "a$b", "system.x", "a\0b", "x" * 300, "$cmd", "é" * 130, "a\ud800"]
)
def test_a_collection_name_that_mongodb_does_not_take_is_refused_at_once(store, queue, source, name):
    with pytest.raises(Refused, match="name another"):
        queue.submit(source, JobOptions(name))


def loaded(planner, queue, ledger, source, **options):
    """A job that has been worked off, without its documents."""
    [prepared] = planner.prepare([queue.submit(source, JobOptions(**options))], "holder")
    if prepared.lease is None:
        return prepared.job
    ledger.close(prepared.lease, Tally(lines=1, inserted=1))
    return queue.finish(prepared.job, Tally(lines=1, inserted=1))


def test_a_second_load_is_told_of_the_first_before_and_after_its_history_is_pruned(
    store, queue, planner, ledger, source
):
    first = loaded(planner, queue, ledger, source)
    assert first.state is JobState.COMPLETED
    second = loaded(planner, queue, ledger, source)
    assert (second.already_loaded_by, second.plan.sole, second.plan.tag) == (first.id, False, first.plan.tag)
    skipped = loaded(planner, queue, ledger, source, if_loaded="skip")
    assert (skipped.state, skipped.already_loaded_by) == (JobState.COMPLETED, second.id)
    store.jobs.update_many({}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    assert Retention(store, ledger).prune(30, 9) == 3
    again = loaded(planner, queue, ledger, source, if_loaded="skip")
    assert (again.already_loaded_by, again.plan.tag) == (second.id, first.plan.tag)
    assert loaded(planner, queue, ledger, source, collection="other", if_loaded="skip").already_loaded_by is None


def test_a_load_that_did_not_complete_is_not_taken_for_one(queue, planner, ledger, source):
    [prepared] = planner.prepare([queue.submit(source, JobOptions())], "holder")
    ledger.give_back(prepared.lease, 0, Tally())
    queue.cancel(prepared.job.id)
    second = loaded(planner, queue, ledger, source, if_loaded="skip")
    assert (second.already_loaded_by, second.plan.sole, second.progress.tally.lines) == (None, False, 1)


def test_a_job_that_was_retried_since_is_not_pruned(store, queue, source):
    job = queue.submit(source, JobOptions())
    queue.cancel(job.id)
    store.jobs.update_many({}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    real = store.jobs.update_one

    class Late:
        """Between the look for old jobs and the first write, somebody retries this one and it ends again."""

        def __getattr__(self, name):
            return getattr(store.jobs, name)

        def update_one(self, *given, **more):
            queue.retry(job.id)
            queue.cancel(job.id)
            return real(*given, **more)

    late = Retention(SimpleNamespace(jobs=Late(), batches=store.batches), queue._ledger)
    assert late.prune(30, 9) == 0
    assert queue.get(job.id).state is JobState.CANCELLED


def test_every_write_that_a_load_depends_on_waits_for_a_majority(settings, submit, drain, monkeypatch):
    concerns = {}

    class Writes(CommandListener):
        def started(self, event):
            if event.command_name in ("insert", "update", "delete", "findAndModify"):
                where = (event.command_name, event.command[event.command_name])
                concerns.setdefault(where, set()).add(event.command.get("writeConcern", {}).get("w"))

        def succeeded(self, event):
            pass

        failed = succeeded

    monkeypatch.setattr("pymongo.monitoring._LISTENERS", _Listeners([Writes()], [], [], [], []))
    drain(submit(b'{"n":1}\n{bad\n' * 1000, max_errors=1000).id, submit(b'{"n":1}\n' * 10**6).id)
    assert {of for of in concerns if of[1] in ("records", "rejects", "sources")} >= {("insert", "records")}
    # A claim on planning guards nothing, and what workers tell of themselves is for people.
    quick = {("update", "jobs"): {1, "majority"}, ("update", "workers"): {1}, ("update", "totals"): {1}}
    quick[("delete", "workers")] = {1}
    assert {of: concern for of, concern in concerns.items() if concern != {"majority"}} == quick


def test_many_ranges_are_written_down_once_however_often_that_is_tried(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(25_000), None)])
    queue.open_ranges(job)
    queue.open_ranges(job)
    assert ledger.sum(job.id).ready == 25_000


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


def test_small_jobs_are_planned_and_finished_together(queue, planner, ledger, objects, source):
    sources = [
        source,
        source,
        *(objects.upload(io.BytesIO(data), f"{uuid.uuid4().hex}.json") for data in (b"[1]", b"", b"{}")),
    ]
    jobs = [queue.submit(each, JobOptions()) for each in sources]
    objects.delete(sources[4].key)
    prepared = {each.job.id: each for each in planner.prepare(jobs, "holder")}
    first, again, array, empty, gone = (prepared[job.id] for job in jobs)
    assert (first.job.plan.sole, again.job.plan.sole) == (True, False)
    assert first.job.plan.tag == again.job.plan.tag
    assert (array.error.code, gone.error.code) == ("refused", "object_gone")
    assert empty.job.state is JobState.COMPLETED
    held = [(each.lease, Tally(lines=2, inserted=1, rejected=number)) for number, each in enumerate((first, again))]
    assert ledger.close_all(held)
    strict = [(first.job, held[0][1]), (again.job, held[1][1])]
    assert [job.state for job in queue.finish_all(strict)] == [JobState.COMPLETED] * 2
    assert {queue.get(job.id).progress.tally.rejected for job in jobs[:2]} == {0, 1}


def test_a_job_that_was_stopped_is_not_finished_with_its_fellows(queue, planner, ledger, objects):
    made = [objects.upload(io.BytesIO(b"{}"), f"{uuid.uuid4().hex}.json") for _ in range(2)]
    prepared = planner.prepare([queue.submit(each, JobOptions()) for each in made], "holder")
    queue.cancel(prepared[0].job.id)
    assert ledger.close_all([(each.lease, Tally(lines=1, inserted=1)) for each in prepared])
    ended = queue.finish_all([(each.job, Tally(lines=1, inserted=1)) for each in prepared])
    assert {job.id: job.state for job in ended} == {
        prepared[0].job.id: JobState.COMPLETED,  # every line of it was loaded before anybody looked
        prepared[1].job.id: JobState.COMPLETED,
    }


def test_a_job_whose_workers_cannot_be_woken_is_there_all_the_same(queue, submit, store, monkeypatch):
    def fail(_):
        raise AutoReconnect("gone")

    monkeypatch.setattr(store, "wakeups", SimpleNamespace(insert_one=fail))
    job = submit(b'{"n":1}\n')
    assert queue.get(job.id).state == "PENDING"


def test_a_fault_in_planning_costs_the_attempt_of_the_job_that_has_it(store, queue, plans, planner, ledger, objects):
    made = [
        objects.upload(io.BytesIO(b'{"n":1}'), f"{name}-{uuid.uuid4().hex}.json") for name in ("good", "odd", "fine")
    ]
    jobs = [queue.submit(each, JobOptions()) for each in made]
    real = planner._plan

    def fail(draft, source):
        if draft.job.source.key.startswith("odd"):
            raise ValueError("a fault of ours")
        return real(draft, source)

    planner._plan = fail
    chooser = Chooser(queue, plans, ledger, planner, "here", threading.Event(), lambda: None)
    runs = chooser.take()
    assert sorted(run.job.id for run in runs) == sorted(job.id for job in (jobs[0], jobs[2]))
    assert [queue.get(job.id).attempts for job in jobs] == [0, 1, 0]
    planner._plan = real
    store.jobs.update_one({"attempts": 1}, {"$unset": {"notBefore": "", "waiting": ""}})
    again = Chooser(queue, plans, ledger, planner, "there", threading.Event(), lambda: None)
    assert [run.job.id for run in again.take()] == [jobs[1].id]


def test_jobs_that_are_old_are_found_by_their_index_however_many_have_ended(store, queue, ledger, source):
    for _ in range(40):
        queue.cancel(queue.submit(source, JobOptions()).id)
    old = [found["_id"] for found in store.jobs.find().limit(5)]
    store.jobs.update_many({"_id": {"$in": old}}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}])
    store.jobs.update_one(
        {"_id": old[0]}, [{"$set": {"pruned": True, "finishedAt": "$$NOW"}}]
    )  # begun, under other settings
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
    ledger.lease = lambda *given: asked.append(given) or real(*given)
    for _ in range(5):
        chooser._looked_at = 0
        assert chooser.take() == []
    assert len(asked) == 1
    fresh = queue.submit(source, JobOptions())
    chooser._looked_at = 0
    assert [run.job.id for run in chooser.take()] == [fresh.id]
    queue.cancel(job.id)
    store.ranges.update_many({"job": job_key(job.id)}, {"$unset": {"notBefore": "", "waiting": ""}})
    queue.retry(job.id)  # another round: what was known of it is void
    chooser._looked_at = 0
    assert [run.job.id for run in chooser.take()] == [job.id]


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


def test_a_job_whose_history_is_being_deleted_cannot_be_retried(store, queue, source):
    job = queue.submit(source, JobOptions())
    queue.cancel(job.id)
    store.jobs.update_one({"_id": job_key(job.id)}, {"$set": {"pruned": True}})
    with pytest.raises(Conflict, match="being deleted"):
        queue.retry(job.id)


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


LATER = datetime(2099, 1, 1, tzinfo=UTC)


def seen(queue):
    return {job.id for page in queue.open_jobs() for job in page}


def looks(store, look):
    """What the server read for the looks at the jobs that `look` takes: the most keys, and the most documents."""
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
    # As an older version puts off, which knows no flag.
    store.jobs.update_one({}, {"$unset": {"waiting": ""}})
    assert plans.claim([job], "other") == []
    plans.postpone(claimed, Failure("unreachable", "S3 does not answer"))
    assert queue.get(job.id).attempts == 1


def test_an_outage_costs_a_job_one_attempt_at_a_time_however_many_workers_have_seen_it(
    store, queue, plans, ledger, objects, settings
):
    made = [objects.upload(io.BytesIO(b"{}\n" * 100_000), f"{uuid.uuid4().hex}.ndjson") for _ in range(4)]
    jobs = [queue.submit(each, JobOptions()) for each in made]

    class Gone:
        def open(self, found, start, stop):
            raise Transient("S3 does not answer")

    def chooser(name):
        planner = Planner(store, queue, plans, ledger, Gone(), settings, lambda: None)
        return Chooser(queue, plans, ledger, planner, name, threading.Event(), lambda: None)

    page = [job for page in queue.open_jobs() for job in page]
    for name in ("one", "two", "three"):
        late = chooser(name)
        for job in page:
            assert late._enter(job) == []
    assert [queue.get(job.id).attempts for job in jobs] == [1, 1, 1, 1]


def test_a_plan_ends_all_waiting(store, queue, plans, source):
    job = queue.submit(source, JobOptions(run_at=LATER))
    plans.fix([(job, plan(1), None)])
    found = store.jobs.find_one({})
    assert (found["state"], "waiting" in found, "notBefore" in found) == ("PROCESSING", False, False)


def test_what_hangs_holds_up_no_job_that_is_looked_at_with_it_or_after_it(
    store, queue, plans, ledger, objects, settings
):
    class Hung:
        def __init__(self):
            self.let_go = threading.Event()

        def open(self, found, start, stop):
            if found.key.startswith("hung"):
                self.let_go.wait(60)
            return objects.open(found, start, stop)

    def jobs(name, count):
        made = [objects.upload(io.BytesIO(b"{}"), f"{name}-{uuid.uuid4().hex}.json") for _ in range(count)]
        return [queue.submit(each, JobOptions()) for each in made]

    hung = Hung()
    quick = settings.model_copy(update={"engine_lease_seconds": 3.0})
    planner = Planner(store, queue, plans, ledger, hung, quick, lambda: None)
    try:
        stuck, fine = jobs("hung", 8), jobs("fine", 8)
        found = {each.job.id: each for each in planner.prepare(plans.claim([*stuck, *fine], "holder"), "holder")}
        assert all(isinstance(found[job.id].error, Transient) for job in stuck)
        assert all(found[job.id].lease for job in fine)
        # With every thread taken, what cannot even be asked for is given back as it was.
        planner.prepare(plans.claim(jobs("hung", 8), "holder"), "holder")
        later = jobs("fine", 2)
        assert planner.prepare(plans.claim(later, "holder"), "holder") == []
        assert [job.id for job in plans.claim(later, "other")] == [job.id for job in later]
        assert [queue.get(job.id).attempts for job in later] == [0, 0]
    finally:
        hung.let_go.set()


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
    assert Retention(store, ledger).prune(30, 9) == 1
    assert store.jobs.count_documents({}) == 0


def test_a_count_of_jobs_that_takes_long_is_not_made_at_every_call(store, queue, source, monkeypatch):
    history = History(store)
    queue.submit(source, JobOptions())
    assert history.backlog().states[JobState.PENDING] == 1
    queue.submit(source, JobOptions(run_at=LATER))
    assert history.backlog().states[JobState.PENDING] == 2
    monkeypatch.setattr("engine.history.CHEAP_SECONDS", 0.0)
    monkeypatch.setattr("engine.history.BACKLOG_SHARE", 1e9)
    assert history.backlog().states[JobState.PENDING] == 2
    queue.submit(source, JobOptions())
    assert history.backlog().states[JobState.PENDING] == 2


def test_a_job_whose_time_has_come_counts_as_waiting_where_no_worker_lets_it_in(store, queue, source):
    queue.submit(source, JobOptions(run_at=LATER))
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
