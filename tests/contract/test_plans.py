"""Who plans a job, which plan holds, and what a planner does with objects that are late or wrong. On real servers."""

import io
import threading
import uuid
from dataclasses import replace

import pytest
from bson import ObjectId

from engine.control.leases import DEATHS, VANISHED
from engine.errors import Conflict, Refused, Transient
from engine.fleet.chooser import Chooser
from engine.load.planner import Planner
from engine.model import Failure, JobOptions, JobState, Tally
from tests.contract.conftest import loaded, plan


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
    plans.release_claims_of_dead(["first"])
    assert [claimed_job.id for claimed_job in plans.claim([job, others[1]], "third")] == [job.id]


def test_a_job_over_whose_plan_workers_die_is_stopped(queue, plans, source):
    job = queue.submit(source, JobOptions())
    for number in range(DEATHS):
        assert plans.claim([job], f"dead {number}")
        plans.release_claims_of_dead([f"dead {number}"])
    assert not plans.claim([job], "next")
    job = queue.get(job.id)
    assert (job.state, job.failure.code) == (JobState.FAILED, "workers_died")


def test_a_claim_whose_answer_was_lost_is_had_by_claiming_again(queue, plans, source):
    job = queue.submit(source, JobOptions())
    for _ in range(DEATHS + 2):
        [claimed] = plans.claim([job], "holder")
    assert claimed.planner_deaths == 0


def test_claims_that_lapse_may_be_of_some_who_only_wait(store, queue, plans, source):
    """It takes more of them than of deaths to stop a job; but from the first one on, the job is planned alone."""
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
    real = planner._sources.register

    def register(drafts):
        """Another worker is quicker, and skips the job."""
        found = real(drafts)
        plans.complete_unread(job, replace(first.plan, sole=False), first.id)
        return found

    monkeypatch.setattr(planner._sources, "register", register)
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
    quick = settings.model_copy(update={"engine_lease_seconds": 8.0})
    planner = Planner(store, queue, plans, ledger, hung, quick, lambda: moves.append(1))
    others = [objects.upload(io.BytesIO(b"{}"), f"{uuid.uuid4().hex}.json") for _ in range(3)]
    jobs = [queue.submit(each, JobOptions()) for each in (source, *others)]
    found = {each.job.id: each for each in planner.prepare(jobs, "holder")}
    hung.let_go.set()
    assert isinstance(found[jobs[0].id].error, Transient)
    assert all(found[job.id].lease for job in jobs[1:])
    assert moves


def test_many_ranges_are_written_down_once_however_often_that_is_tried(queue, plans, ledger, source):
    [job] = plans.fix([(queue.submit(source, JobOptions()), plan(25_000), None)])
    queue.open_ranges(job)
    queue.open_ranges(job)
    assert ledger.summarize(job.id).ready == 25_000


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


def test_a_job_that_was_planned_after_all_is_not_stopped_for_its_last_attempt(store, queue, plans, source):
    job = queue.submit(source, JobOptions())
    store.jobs.update_one({"_id": ObjectId(job.id)}, {"$set": {"attempts": 5}})
    late = queue.get(job.id)
    plans.fix([(late, plan(1), None)])
    plans.postpone(late, Failure("unavailable", "no primary"))
    assert (queue.get(job.id).state, queue.get(job.id).stopping) == (JobState.PROCESSING, None)


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

    page = [job for page in queue.open_jobs.ready() for job in page]
    for name in ("one", "two", "three"):
        late = chooser(name)
        for job in page:
            assert late._enter(job, ahead=False) == []
    assert [queue.get(job.id).attempts for job in jobs] == [1, 1, 1, 1]


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
    quick = settings.model_copy(update={"engine_lease_seconds": 8.0})
    planner = Planner(store, queue, plans, ledger, hung, quick, lambda: None)
    try:
        stuck, fine = jobs("hung", 8), jobs("fine", 8)
        found = {each.job.id: each for each in planner.prepare(plans.claim([*stuck, *fine], "holder"), "holder")}
        assert all(isinstance(found[job.id].error, Transient) for job in stuck)
        assert all(found[job.id].lease for job in fine)
        # While all threads hang, a job whose object cannot even be requested is given back unchanged.
        planner.prepare(plans.claim(jobs("hung", 8), "holder"), "holder")
        later = jobs("fine", 2)
        assert planner.prepare(plans.claim(later, "holder"), "holder") == []
        assert [job.id for job in plans.claim(later, "other")] == [job.id for job in later]
        assert [queue.get(job.id).attempts for job in later] == [0, 0]
    finally:
        hung.let_go.set()


def register_alone(planner, plans, job, monkeypatch):
    """Register a job's source, and fail before its plan is fixed."""

    def fail(_):
        raise Transient("stepped down")

    with monkeypatch.context() as patch:
        patch.setattr(plans, "fix", fail)
        with pytest.raises(Transient):
            planner.prepare([job], "holder")


def test_a_job_that_registered_first_and_was_overtaken_does_not_count_what_the_other_has_loaded(
    store, queue, planner, plans, ledger, source, monkeypatch
):
    first = queue.submit(source, JobOptions())
    register_alone(planner, plans, first, monkeypatch)
    second = loaded(planner, queue, ledger, source)
    store.data["records"].insert_one({})
    [prepared] = planner.prepare([first], "holder")
    assert (second.plan.sole, prepared.job.plan.sole, prepared.job.already_loaded_by) == (False, False, second.id)


@pytest.mark.parametrize("forced", [False, True])
def test_a_job_that_registered_and_is_planned_again_is_the_first_all_the_same(
    store, queue, planner, plans, ledger, source, monkeypatch, forced
):
    job = queue.submit(source, JobOptions())
    register_alone(planner, plans, job, monkeypatch)
    # Documents that a forced load wrote have ids of their own, so they are not taken for this job's.
    other = loaded(planner, queue, ledger, source, force=True) if forced else None
    store.data["records"].insert_one({})
    [prepared] = planner.prepare([job], "holder")
    assert (prepared.job.plan.sole, prepared.job.already_loaded_by) == (True, other and other.id)


def test_a_collection_that_became_capped_since_a_job_was_submitted_takes_none_of_it(
    store, queue, plans, planner, ledger, source
):
    """It would accept every document, but keep only the last ones."""
    first, again, other = (queue.submit(source, JobOptions(name)) for name in ("capped", "later", "records"))
    [again] = plans.fix([(again, plan(2), None)])
    queue.cancel(again.id)
    for name in ("capped", "later"):
        store.data.create_collection(name, capped=True, size=4096)
    prepared = {each.job.id: each for each in planner.prepare([first, other], "holder")}
    assert prepared[other.id].lease
    assert isinstance(prepared[first.id].error, Refused)
    with pytest.raises(Conflict, match="it is capped; use another one in a new job"):
        queue.retry(again.id)
