"""However long the history of jobs is, no call reads more of it than it needs, by the profiler of a real mongod."""

from contextlib import suppress
from datetime import UTC, datetime

import pytest
from bson import ObjectId

from engine.control.history import History
from engine.control.job_batches import JobBatches
from engine.control.jobs import Ticket
from engine.control.loads import Loads
from engine.control.retention import Retention
from engine.errors import KeyReused
from engine.model import Format, JobOptions, JobState
from engine.s3.client import connect
from engine.s3.direct import DirectUploads
from tests.contract.conftest import loaded

HISTORY = 1000
FEW = 50
"""The most documents that one operation may examine."""

GROWING = {"jobs", "batches", "ranges", "sources", "rejects", "claims", "uploads"}
"""Collections that grow with the history."""


@pytest.fixture
def read_too_much(store):
    """A function: the operations since its last call that examined more than `FEW` documents, or a whole collection."""
    store.control.command("profile", 2)

    def run():
        store.control.command("profile", 0)
        profile = store.control["system.profile"]
        seen = [entry for entry in profile.find() if entry["ns"].split(".", 1)[1] in GROWING]
        assert seen
        profile.drop()
        store.control.command("profile", 2)
        return [
            (entry["ns"], entry["op"], entry.get("planSummary"), entry.get("docsExamined"), entry["command"])
            for entry in seen
            if "COLLSCAN" in entry.get("planSummary", "") or entry.get("docsExamined", 0) > FEW
        ]

    yield run
    store.control.command("profile", 0)


@pytest.fixture
def history(store, queue, planner, ledger, source):
    """A job that has ended, beside `HISTORY` others, each of them with an object, a ticket and a batch of its own."""
    job = loaded(planner, queue, ledger, source)
    kept = store.jobs.find_one({"_id": ObjectId(job.id)})
    assert kept is not None
    when = {"finishedAt": datetime.now(UTC)}
    others = [
        kept
        | when
        | {"_id": ObjectId(), "batch": ObjectId(), "ticket": {"key": f"old-{number}", "digest": ""}}
        | {"source": kept["source"] | {"key": f"{number}.ndjson"}}
        for number in range(HISTORY)
    ]
    store.jobs.insert_many(others)
    store.batches.insert_many(
        [{"_id": other["batch"], "ticket": other["ticket"], "keys": [], "count": 1} for other in others]
    )
    return job


def test_to_submit_reads_no_history(history, store, queue, source, read_too_much):
    queue.submit(source, JobOptions(), Ticket("one", "digest"))
    assert queue.redeem(Ticket("none", "digest")) is None
    assert queue.redeem(Ticket("one", "digest")) is not None
    with suppress(KeyReused):
        queue.submit(source, JobOptions(), Ticket("one", "another"))
    batches = JobBatches(store)
    batches.submit([source], JobOptions())
    batch = batches.submit([source], JobOptions(), Ticket("many", "digest"))
    assert batches.redeem(Ticket("none", "digest")) is None
    assert batches.redeem(Ticket("many", "digest")) == (batch, [])
    assert batches.get(batch.id).count == 1
    assert read_too_much() == []


def test_to_look_reads_no_more_of_the_history_than_is_shown(history, store, queue, read_too_much):
    page = History(store).page
    batch = store.jobs.find_one({"source.key": "7.ndjson"})["batch"]
    assert [job.source.key for job in page(20, batch=str(batch))] == ["7.ndjson"]
    assert len(page(20)) == len(page(20, before=history.id, state=JobState.COMPLETED)) + 20 == 20
    assert len(page(20, state=JobState.COMPLETED)) == len(page(20, collection="records")) == 20
    assert [job.id for job in page(20, key=history.source.key)] == [history.id]
    assert page(20, state=JobState.FAILED) == []
    assert queue.get(history.id) == history
    assert History(store).ranges(history.id).states
    assert History(store).open_job_of(history.source.bucket, history.source.key) is None
    assert read_too_much() == []


def test_what_a_dead_worker_was_about_to_plan_is_freed_without_a_look_at_other_jobs(
    store, queue, plans, source, read_too_much
):
    jobs = [queue.submit(source, JobOptions()) for _ in range(FEW * 2)]
    plans.claim(jobs[-2:], "dead")
    read_too_much()
    plans.release_claims_of_dead(["dead", "dead too"])
    assert read_too_much() == []
    assert [queue.get(job.id).planner_deaths for job in jobs] == [0] * (len(jobs) - 2) + [1, 1]


def test_a_worker_reads_no_history(history, store, ledger, source, submit, drain, read_too_much):
    [done] = drain(submit(b'{"n":1}\n').id, engine_poll_seconds=0.1)
    assert done.state is JobState.COMPLETED
    [again] = drain(submit(b'{"n":1}\n', done.source.key, if_loaded="skip").id)
    assert again.already_loaded_by == done.id
    assert read_too_much() == []


def test_however_often_a_load_was_skipped_the_one_before_them_is_found_at_once(
    store, queue, planner, ledger, source, read_too_much
):
    job = loaded(planner, queue, ledger, source)
    skipped = loaded(planner, queue, ledger, source, if_loaded="skip")
    kept = store.jobs.find_one({"_id": ObjectId(skipped.id)})
    store.jobs.insert_many([kept | {"_id": ObjectId()} for _ in range(FEW * 2)])
    assert Loads(store, ledger).loaded_by(job, Format.NDJSON) == job.id
    assert read_too_much() == []


def test_however_often_an_object_was_overwritten_other_loads_of_this_version_are_found_at_once(
    history, store, queue, planner, ledger, source, read_too_much
):
    store.jobs.update_many({}, [{"$set": {"source.key": source.key, "source.etag": {"$toString": "$_id"}}}])
    [job] = [queue.submit(source, JobOptions(if_loaded="skip"))]
    read_too_much()
    loads = Loads(store, ledger)
    assert loads.loaded_by(job, Format.NDJSON) is None
    assert loads.others_may_load(job, Format.NDJSON) is False
    assert loads.others_loaded(job, Format.NDJSON) is False
    assert read_too_much() == []


def test_what_is_old_goes_without_a_look_at_what_is_not(history, settings, store, ledger, objects, read_too_much):
    long_ago = {"$set": {"finishedAt": datetime(2020, 1, 1, tzinfo=UTC)}}
    store.jobs.update_many({"source.key": {"$in": ["7.ndjson", "8.ndjson"]}}, long_ago)
    read_too_much()
    assert Retention(store, ledger).prune(1, 20) == 2
    uploads = DirectUploads(store, connect(settings), objects, settings.api_part_bytes)
    assert uploads.sweep(lambda: True) == 0
    assert ledger.expire() == []
    assert ledger.release(("gone",)) == []
    assert read_too_much() == []
