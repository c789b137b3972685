"""Dry runs on a real MongoDB and S3: they report what a load would, and leave nothing behind."""

import uuid

import bson
import pytest
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument

from engine.model import JobState
from tests.running import failing

# For each case: a validator, unique indexes, lines, and how many of the lines are inserted and rejected.
JUDGED = {
    "numbers of two types are one _id": ({}, [], b'{"_id":1}\n{"_id":1.0,"b":1}\n', (1, 1)),
    "and one key": ({}, ["e"], b'{"e":1}\n{"e":1.0}\n{"e":2}\n{"e":0}\n{"e":-0.0}\n', (3, 2)),
    "deep down as well": ({}, ["e"], b'{"e":{"x":1,"y":2}}\n{"e":{"x":1.0,"y":2}}\n', (1, 1)),
    "there is one already": ({}, ["e"], b'{"_id":5}\n{"_id":6.0}\n{"e":7.0}\n', (0, 3)),
    "what looks like an operator is none": (
        {},
        ["ref"],
        b'{"ref":{"$oid":"5f"}}\n{"ref":{"$gt":""}}\n{"ref":{"$oid":"5f"}}\n',
        (2, 1),
    ),
    "one of two with an _id is not valid": (
        {"a": {"$exists": True}},
        [],
        b'{"_id":1,"a":1}\n{"_id":1}\n{"_id":2}\n',
        (1, 2),
    ),
    "who loses one claim has no other": (
        {},
        ["e"],
        b'{"_id":1,"e":"there"}\n{"_id":1,"e":"y"}\n{"_id":2,"e":"y"}\n{"_id":2}\n',
        (2, 2),
    ),
    "an index over a field and a part of it": (
        {},
        [("e", "e.x"), ("_id.n", "e")],
        b'{"e":{"x":1}}\n{"e":{"x":1}}\n{"e":"there"}\n',
        (1, 2),
    ),
    "a reference is no operator": (
        {},
        [],
        (
            b'{"_id":{"$ref":"c","$id":1}}\n{"_id":{"a":[{"$ref":"c","$id":1,"$db":"d","more":2}]}}\n{"_id":{"$id":1,"$ref":"c"}}\n'
            b'{"_id":{"$ref":"c"}}\n{"_id":{"$ref":"c","$id":1,"more":1,"$db":"d"}}\n{"_id":{"$ref":1,"$id":1}}\n'
        ),
        (2, 4),
    ),
    "what is empty is not looked into": (
        {},
        [],
        b"".join(
            b'{"a":' * deep + inner + b"}" * deep + b"\n" for deep in (179, 180) for inner in (b"{}", b"[]", b"[1]")
        ),
        (5, 1),
    ),
    "a validator that stumbles": (
        {"$expr": {"$gt": [{"$strLenCP": "$a"}, 3]}},
        [],
        b'{"b":1}\n{"a":"long enough"}\n{"a":"no"}\n',
        (1, 2),
    ),
}


@pytest.mark.parametrize("case", JUDGED)
def test_a_dry_run_tells_what_a_load_would(store, submit, drain, case):
    validator, unique, data, numbers = JUDGED[case]
    there = store.data.create_collection("records", validator=validator) if validator else store.data["records"]
    for field in unique:
        there.create_index([(name, 1) for name in field] if isinstance(field, tuple) else field, unique=True)
    if not validator:
        there.insert_many([{"_id": 5.0, "e": "there", "ref": 1}, {"_id": 6, "e": 7, "ref": 2}])
    job = submit(data, f"{uuid.uuid4().hex}.ndjson", validate=True)
    [dry] = drain(job.id)
    [load] = drain(submit(data, f"{uuid.uuid4().hex}.ndjson").id)
    told = [(each.state, each.progress.tally.inserted, each.progress.tally.rejected) for each in (dry, load)]
    assert told == [(JobState.COMPLETED, *numbers)] * 2
    assert store.claims.count_documents({}) == 0


def test_an_option_of_an_index_that_is_off_is_none(store, submit, drain):
    """An index that lists `sparse: false` is checked like any other, unlike a sparse one."""
    store.data["records"].create_index("e", unique=True, sparse=False)
    [dry] = drain(submit(b'{"e":1}\n{"e":1,"b":2}\n', validate=True).id)
    assert (dry.progress.tally.inserted, dry.progress.tally.rejected) == (1, 1)


def test_a_dry_run_compares_documents_with_dates_beyond_those_of_python(store, submit, drain):
    store.data["records"].create_index("e.x", unique=True)
    store.data["records"].insert_one({"e": {"x": 1, "at": DatetimeMS(2**60)}})
    bad_text = bson.encode({"e": {"x": 3, "text": "zz"}}).replace(b"zz", b"\xff\xfe")
    store.data["records"].insert_one(RawBSONDocument(bad_text))
    [dry] = drain(submit(b'{"e":{"x":1}}\n{"e":{"x":2}}\n{"e":{"x":3}}\n', validate=True).id)
    assert (dry.state, dry.progress.tally.inserted, dry.progress.tally.rejected) == (JobState.COMPLETED, 1, 2)


def test_a_dry_run_over_its_budget_leaves_no_claims_either(store, submit, drain):
    [dry] = drain(submit(b'{"_id":1}\n{"_id":2}\nbad\n', validate=True, max_errors=0).id)
    assert (dry.state, dry.failure.code) == (JobState.FAILED, "too_many_errors")
    assert store.claims.count_documents({}) == 0


def test_a_dry_run_survives_a_majority_that_lags_while_it_lets_go_of_claims(store, submit, drain):
    store.data["records"].create_index("e", unique=True)
    lags = {"writeConcernError": {"code": 64, "errmsg": "", "errInfo": {"wtimeout": True}}}
    with failing(store.client, ["delete"], {"times": 1}, **lags) as came:
        [dry] = drain(submit(b'{"_id":1,"e":1}\n{"_id":2,"e":1}\n', validate=True).id)
    assert came == [1]
    assert (dry.state, dry.progress.tally.inserted, dry.progress.tally.rejected) == (JobState.COMPLETED, 1, 1)


@pytest.mark.parametrize(("seconds", "left"), [(60.0, 0), (-1.0, 80)])
def test_what_a_dry_run_has_claimed_is_let_go_slice_by_slice_while_that_takes_no_long(
    store, submit, drain, monkeypatch, seconds, left
):
    """A worker deletes claims only until `RELEASE_SECONDS` are over: it has other work to do."""
    monkeypatch.setattr("engine.control.store.SLICE", 20)
    monkeypatch.setattr("engine.control.queue.RELEASE_SECONDS", seconds)
    [dry] = drain(submit(b"".join(b'{"_id":%d}\n' % n for n in range(100)), validate=True).id)
    assert (dry.state, dry.progress.tally.inserted) == (JobState.COMPLETED, 100)
    assert store.claims.count_documents({}) == left


@pytest.mark.parametrize("field", ["_id", "e"])
def test_a_dry_run_of_keys_that_are_larger_as_bson_than_a_query_may_be(store, submit, drain, field):
    if field != "_id":
        store.data["records"].create_index(field, unique=True)
    ones = b"1," * 2050
    lines = b"".join(b'{"%b":{"a":[%b%d]}}\n' % (field.encode(), ones, n) for n in range(1000))
    [dry] = drain(submit(lines, validate=True).id, engine_batch_bytes=4 * 2**20)
    assert (dry.state, dry.progress.tally.inserted) == (JobState.COMPLETED, 1000)
