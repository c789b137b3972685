"""Loads of a version that was loaded before: it is told, and nothing is stored twice unless that is asked for."""

from dataclasses import replace

import bson
import pytest
from bson import ObjectId

from engine.control.ledger import Ledger
from engine.control.retention import Retention
from engine.errors import NotFound
from engine.model import JobState
from tests.running import failing


def test_loading_the_same_version_again_changes_nothing_and_says_so(store, submit, drain, queue):
    data = b"".join(b'{"n":%d}\n' % n for n in range(2500)) + b'{"_id":1,"n":0}\n'
    first = submit(data)
    drain(first.id)
    before = bson.encode({"all": list(store.data["records"].find().sort("_id", 1))})
    second = queue.submit(first.source, first.options)
    [second] = drain(second.id)
    assert bson.encode({"all": list(store.data["records"].find().sort("_id", 1))}) == before
    assert (second.already_loaded_by, second.progress.tally.duplicates, second.progress.tally.inserted) == (
        first.id,
        2501,
        0,
    )


def test_if_loaded_skip_completes_at_once_and_force_loads_a_second_copy(store, submit, drain, queue, objects):
    first = submit(b"{}\n{}\n", key="again.ndjson")
    drain(first.id)
    skipped = submit(b"{}\n{}\n", key="again.ndjson", if_loaded="skip")
    [skipped] = drain(skipped.id)
    [dry] = drain(submit(b"{}\n{}\n", key="again.ndjson", if_loaded="skip", validate=True).id)
    [forced] = drain(submit(b"{}\n{}\n", key="again.ndjson", force=True).id)
    assert (skipped.already_loaded_by, skipped.progress.tally.lines) == (first.id, 0)
    assert (dry.already_loaded_by, dry.progress.tally.lines) == (first.id, 2)  # a dry run is never skipped
    assert forced.progress.tally.inserted == 2
    assert store.data["records"].count_documents({}) == 4


def test_old_jobs_are_pruned_with_all_that_is_theirs_and_a_second_load_is_still_told(store, submit, drain, queue):
    first, other = submit(b"{}\nbad\n", key="old.ndjson"), submit(b"{}\nbad\n", key="new.ndjson")
    drain(first.id, other.id)
    store.jobs.update_one({"_id": ObjectId(first.id)}, [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 31]}}}])
    retention = Retention(store, Ledger(store, 30))
    assert (retention.prune(30, 9), retention.prune(30, 9)) == (1, 0)
    with pytest.raises(NotFound, match="pruned"):
        queue.get(first.id)
    assert store.ranges.distinct("job") == [ObjectId(other.id)]
    assert {found["_id"]["job"] for found in store.rejects.find()} == {ObjectId(other.id)}
    again = queue.submit(first.source, first.options)
    [again] = drain(again.id)
    assert (again.already_loaded_by, again.progress.tally.duplicates) == (first.id, 1)


def test_loads_of_one_object_that_come_together_are_told_of_each_other(store, submit, drain, queue):
    first = submit(b'{"n":1}\n' * 50)
    others = [queue.submit(first.source, replace(first.options, if_loaded="skip")) for _ in range(3)]
    jobs = drain(first.id, *(job.id for job in others))
    assert sum(job.progress.tally.inserted for job in jobs) == 50
    assert sum(job.already_loaded_by is not None for job in jobs) == 3
    assert store.data["records"].count_documents({}) == 50


def test_skip_knows_of_what_force_has_loaded(store, submit, drain, queue, objects):
    first = submit(b'{"a":1}\n{"a":2}\n', "forced.ndjson", force=True)
    drain(first.id)
    second = queue.submit(objects.head("forced.ndjson"), replace(first.options, force=False, if_loaded="skip"))
    [second] = drain(second.id)
    assert (second.state, second.already_loaded_by) == (JobState.COMPLETED, first.id)
    assert store.data["records"].count_documents({}) == 2


def test_what_was_loaded_and_deleted_is_inserted_anew_whatever_is_lost_on_the_way(store, submit, drain, queue):
    data = b'{"n":1}\n' * 3000
    first = submit(data)
    drain(first.id)
    store.data["records"].drop()
    again = queue.submit(first.source, first.options)
    unheard = {"writeConcernError": {"code": 91, "errmsg": "stopping"}}
    with failing(store.client, ["insert"], {"times": 1}, **unheard) as came:
        [job] = drain(again.id)
    assert came == [1]
    tally = job.progress.tally
    assert (tally.inserted, tally.duplicates, store.data["records"].count_documents({})) == (3000, 0, 3000)
    [third] = drain(queue.submit(first.source, first.options).id)
    assert (third.progress.tally.inserted, third.progress.tally.duplicates) == (0, 3000)
