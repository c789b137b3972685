"""Whole loads on a real MongoDB and S3: all good lines are stored, and bad ones become rejects at their offset."""

import json
import threading

import bson
import pytest
from bson import ObjectId
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from pydantic import SecretStr

from engine.control.ledger import Ledger
from engine.model import Format, JobState
from engine.text.encode import COMPILED
from tests.running import failing, taking

BAD = {
    b"{": "invalid_json",
    b'{"a":NaN}': "invalid_json",
    b'{"a":"\\ud800"}': "invalid_json",
    b'{"a":"\xff\xfe"}': "invalid_json",
    b"[" * 1030 + b"]" * 1030: "invalid_json",
    b"[1,2]": "not_an_object",
    b"null": "not_an_object",
    b'{"a":9223372036854775808}': "int_range",
    b'{"a":[-99999999999999999999]}': "int_range",
    b'{"a\\u0000b":1}': "bad_key",
    b'{"_id":[1]}': "bad_id",
    b'{"_id":{"$a":1}}': "bad_id",
    b'{"a":' * 190 + b"1" + b"}" * 190: "too_deep",
    b'{"a":' * 300 + b"1" + b"}" * 300: "too_deep",
    b'{"_id":"own","v":2}': "duplicate_key",
}


def mixed(times: int) -> tuple[bytes, list[bytes], list[tuple[int, str]]]:
    """A file with every kind of bad line among good ones: its bytes, the good lines, and the expected rejects."""
    good, bad, out, offset = [], [], [], 0

    def put(line: bytes) -> None:
        nonlocal offset
        out.append(line)
        offset += len(line) + 1

    put(b'{"_id":"own","v":1}')
    for turn in range(times):
        for line, reason in BAD.items():
            for number in range(20):
                body = json.dumps({"turn": turn, "number": number, "text": "ß€" * (number * 3)}, ensure_ascii=False)
                good.append(body.encode())
                put(good[-1])
            bad.append((offset, reason))
            put(line)
        put(b"  ")
    return b"\n".join(out), good, bad


@pytest.fixture(params=["extension", "driver"] if COMPILED else ["driver"])
def encoder(request, monkeypatch):
    """Who encodes the documents; without a C compiler, there is only the driver."""
    if request.param == "driver":
        monkeypatch.setattr("engine.text.encode._compiled", None)
        monkeypatch.setattr("engine.text.decode.COMPILED", False)


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize("range_bytes", [64 * 1024, 100_000, 8 * 1024 * 1024])
def test_good_lines_land_and_each_bad_one_is_a_reject_at_its_offset(store, submit, drain, rejects, range_bytes):
    data, good, bad = mixed(8)
    # Of rivals for an `_id`, the one that is written first is stored, and batches are written side by side.
    store.data["records"].insert_one({"_id": "own", "v": 1})
    job = submit(data, max_errors=10_000)
    [job] = drain(job.id, engine_range_bytes=range_bytes)
    assert (job.state, job.failure) == (JobState.COMPLETED, None)
    found = rejects.page(job.id, 10_000)[0]
    assert [(reject["offset"], reject["reason"]) for reject in found] == bad
    lines = data.split(b"\n")
    assert all(
        lines[reject["line"] - 1][:65536] == raw for reject, raw in zip(found, rejects.lines(job.id), strict=True)
    )
    stored = list(store.data["records"].find({"_id": {"$ne": "own"}}).sort("_id", 1))
    assert [{k: v for k, v in d.items() if k != "_id"} for d in stored] == [json.loads(line) for line in good]
    for document in stored:
        offset = int.from_bytes(document["_id"].binary[6:], "big")
        assert json.loads(data[offset:].split(b"\n", 1)[0]) == {k: v for k, v in document.items() if k != "_id"}
    tally = job.progress.tally
    assert (tally.lines, tally.bytes) == (len(lines), len(data))
    assert (tally.inserted, tally.rejected, tally.blank, tally.duplicates) == (len(good) + 1, len(bad), 8, 0)


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize("name", ["a.ndjson", "a.txt"])
def test_a_long_run_of_bad_and_blank_lines_costs_the_good_ones_nothing(store, submit, drain, name):
    lines = [b'{"n":1}', *[b"\xff" * 99] * 700, b'{"n":2}', *[b" " * 99] * 700, b'{"n":3}', b"\xff" * 80_000]
    [job] = drain(submit(b"\n".join(lines), key=name, max_errors=1000).id)
    tally = job.progress.tally
    assert (job.state, tally.inserted, tally.rejected, tally.blank) == (JobState.COMPLETED, 3, 701, 700)
    assert store.data["records"].count_documents({}) == 3


@pytest.mark.usefixtures("encoder")
def test_a_document_too_large_for_mongodb_costs_only_itself(store, submit, drain, rejects):
    # As BSON: exactly the limit, a few bytes over it, further over it, and larger than a message may be. The driver
    # fails in three different ways.
    sizes = [16 * 2**20 - 30, 16 * 2**20 + 1, 17 * 2**20, 20 * 2**20, 50 * 2**20]
    data = b"".join(b'{"n":%d}\n{"a":"%s"}\n' % (n, b"x" * size) for n, size in enumerate(sizes))
    [job] = drain(submit(data).id, engine_max_line_bytes=64 * 2**20)
    assert [(r["reason"], r["length"]) for r in rejects.page(job.id, 10)[0]] == [
        ("too_large", n + 8) for n in sizes[1:]
    ]
    stored = list(store.data["records"].find().sort("_id", 1))
    assert [d.get("n", len(d.get("a", ""))) for d in stored] == [0, sizes[0], 1, 2, 3, 4]


def test_a_line_over_the_limit_is_skipped_and_told(submit, drain, rejects):
    data = b'{"n":1}\n{"a":"' + b"x" * 300_000 + b'"}\n{"n":2}\n'
    [job] = drain(submit(data).id, engine_max_line_bytes=100_000, engine_range_bytes=65_536)
    [reject] = rejects.page(job.id, 10)[0]
    assert (reject["offset"], reject["reason"], reject["length"], reject["line"]) == (8, "too_large", 300_008, 2)
    assert job.progress.tally.inserted == 2


@pytest.mark.usefixtures("encoder")
def test_text_is_stored_line_by_line(store, submit, drain):
    job = submit("one\r\n\nzwölf\nlast".encode(), key="some/where/a b.txt")
    [job] = drain(job.id)
    assert job.plan.format is Format.TEXT
    found = store.data["records"].find({}, {"_id": 0}).sort("_id", 1)
    assert list(found) == [{"content": line, "originalFile": "some/where/a b.txt"} for line in ("one", "zwölf", "last")]


@pytest.mark.parametrize(
    ("data", "lines"),
    [(b"", 0), (b"\n", 1), (b"{}", 1), (b"{}\n", 1), (b"\xef\xbb\xbf{}\r\n{}\r\n", 2), (b"\n" * 5, 5)],
)
def test_small_files_complete(submit, drain, data, lines):
    [job] = drain(submit(data).id)
    assert (job.state, job.progress.tally.lines, job.progress.tally.bytes) == (JobState.COMPLETED, lines, len(data))


@pytest.mark.parametrize(
    ("data", "key", "word"),
    [
        ("{}\n".encode("utf-16"), "a.ndjson", "UTF-16"),
        (b"\x1f\x8b\x08\0\0\0", "a.ndjson", "gzip"),
        (b'[{"a":1}]', "a.json", "JSON array"),
    ],
)
def test_a_file_that_is_no_text_of_lines_fails_early_in_a_plain_sentence(submit, drain, store, data, key, word):
    [job] = drain(submit(data, key=key).id)
    assert job.state is JobState.FAILED
    assert word in job.failure.message
    assert store.data["records"].count_documents({}) == 0


def test_three_hundred_small_files_complete(store, submit, drain):
    jobs = [submit(b'{"n":%d}\n{"n":%d}\n' % (n, n), key=f"many/{n}.ndjson").id for n in range(300)]
    assert {job.state for job in drain(*jobs, seconds=120)} == {JobState.COMPLETED}
    assert store.data["records"].count_documents({}) == 600


@pytest.mark.usefixtures("encoder")
def test_a_compressed_connection_carries_the_same_documents(settings, store, submit, drain):
    """The driver makes the messages of such a connection in another way."""
    data, good, bad = mixed(2)
    uri = SecretStr(f"{settings.mongo_uri.get_secret_value()}&compressors=zlib")
    [job] = drain(submit(data, max_errors=10_000).id, mongo_uri=uri)
    tally = job.progress.tally
    assert (job.state, tally.inserted, tally.rejected) == (JobState.COMPLETED, len(good) + 1, len(bad))
    stored = store.data["records"].find({"_id": {"$ne": "own"}}, {"_id": 0}).sort("_id", 1)
    assert list(stored) == [json.loads(line) for line in good]


def test_a_unique_index_and_a_validator_of_the_collection_refuse_single_documents(store, submit, drain, rejects):
    store.data.create_collection("strict", validator={"n": {"$type": "int"}})
    store.data["strict"].create_index("n", unique=True)
    [job] = drain(submit(b'{"n":1}\n{"n":"x"}\n{"n":1}\n{"n":2}\n', collection="strict").id)
    found = rejects.page(job.id, 10)[0]
    assert [(r["offset"], r["reason"], r["code"]) for r in found] == [(8, "refused", 121), (18, "duplicate_key", 11000)]
    said, info = found[0]["detail"].split(": ", 1)
    assert (said, json.loads(info)["details"]["operatorName"]) == ("Document failed validation", "$type")
    assert sorted(d["n"] for d in store.data["strict"].find()) == [1, 2]


def test_what_a_reject_tells_is_of_its_line_alone(store, submit, drain, rejects):
    [job] = drain(submit(b'{"a":' * 300 + b"1" + b"}" * 300 + b"\n{}\n[}\n").id)
    deep, bad = (r["detail"] for r in rejects.page(job.id, 10)[0])
    assert deep == "the document is nested deeper than MongoDB allows"
    assert bad.endswith(": column 2 of the line")


@pytest.mark.parametrize(
    ("max_errors", "state"), [(0, "FAILED"), (2, "FAILED"), (3, "COMPLETED"), ("29%", "FAILED"), ("30%", "COMPLETED")]
)
def test_the_error_budget_is_kept(submit, drain, max_errors, state):
    [job] = drain(submit(b"{}\n" * 7 + b"bad\n" * 3, max_errors=max_errors).id)
    assert job.state == state
    assert (job.failure is None) == (state == "COMPLETED")


def test_a_percentage_is_judged_as_the_job_runs(submit, drain):
    data = b"".join(b"bad\n" if n % 30 == 0 else b'{"n":%d}\n' % n for n in range(150_000))
    job = submit(data, max_errors="2%")
    [job] = drain(job.id, engine_range_bytes=64 * 1024, engine_batch_records=20)
    assert (job.state, job.failure.code) == (JobState.FAILED, "too_many_errors")
    assert 10_000 <= job.progress.tally.lines < 150_000


def test_an_object_overwritten_before_it_is_read_fails_the_job(submit, drain, objects, store):
    job = submit(b'{"v":1}\n', key="moving.ndjson")
    submit(b'{"v":2}\n', key="moving.ndjson")
    [job] = drain(job.id)
    assert (job.state, job.failure.code) == (JobState.FAILED, "object_changed")


def test_a_generated_id_leads_back_to_the_byte(store, submit, drain):
    [job] = drain(submit(b'{"a":1}\n{"a":2}\n').id)
    assert [d["_id"] for d in store.data["records"].find().sort("_id", 1)] == [
        ObjectId(job.plan.tag + offset.to_bytes(6, "big")) for offset in (0, 8)
    ]


def test_small_jobs_wait_their_turn_without_losing_their_leases(store, submit, drain, ledger, monkeypatch):
    """With one writer, the last job waits for longer than a lease lasts: its lease must be renewed meanwhile."""
    monkeypatch.setattr("engine.control.ledger.EXPIRY_GRACE_SECONDS", 0)
    store.data.create_collection("slow")
    jobs = [submit(b'{"n":1}\n' * 3000, collection="slow") for _ in range(3)]
    over, freed = threading.Event(), []

    def expire():
        while not over.wait(0.3):
            freed.extend(ledger.expire())

    other = threading.Thread(target=expire)
    other.start()
    try:
        with failing(store.client, ["insert"], **taking(1500)):
            ended = drain(*(job.id for job in jobs), engine_lease_seconds=10.0, engine_writers=1)
    finally:
        over.set()
        other.join()
    assert {job.state for job in ended} == {JobState.COMPLETED}
    assert freed == []
    assert store.data["slow"].count_documents({}) == 9000


def test_further_ranges_begin_with_the_command_that_closes_the_one_before(store, submit, drain, monkeypatch):
    real, begun = Ledger.close_all, []

    def close_all(self, leases, begin=None):
        begun.append(begin.range.index)
        return real(self, leases, begin)

    monkeypatch.setattr(Ledger, "close_all", close_all)
    job = submit(b"".join(b'{"n":%d}\n' % n for n in range(50_000)))
    with failing(store.client, ["insert"], **taking(30)):
        [job] = drain(job.id, engine_range_bytes=64 * 1024, engine_batch_records=400)
    assert (job.state, job.progress.ranges_total) == (JobState.COMPLETED, 9)
    assert store.data["records"].count_documents({}) == 50_000
    assert begun
    assert 0 not in begun
    assert len(begun) == len(set(begun))


LONG = "é" * 100


@pytest.mark.parametrize("at_once", [1000, 3])
def test_a_value_that_the_server_cuts_in_the_midst_of_a_character_costs_no_other_line(
    store, submit, drain, rejects, at_once
):
    """The server cuts long values that it quotes in errors at any byte, so its reply may not be valid UTF-8."""
    lines = [json.dumps({"_id": f"{number:03}{LONG}", "n": number}) for number in range(20)]
    lines += [json.dumps({"_id": f"006{LONG}", "n": "another"})]
    [job] = drain(submit("\n".join(lines).encode()).id, engine_batch_records=at_once)
    tally = job.progress.tally
    assert (job.state, tally.inserted, tally.rejected) == (JobState.COMPLETED, 20, 1)
    assert [found["reason"] for found in rejects.page(job.id, 10)[0]] == ["duplicate_key"]
    assert store.data["records"].count_documents({}) == 20


def test_a_replay_of_such_a_value_is_a_replay(submit, drain, store):
    """The server cuts these `_id`s within a character when it reports duplicates, which must not become rejects."""
    data = "\n".join(json.dumps({"_id": f"{number}{LONG}"}) for number in range(50)).encode()
    job = submit(data, "long.ndjson")
    drain(job.id)
    [again] = drain(submit(data, "long.ndjson", max_errors=0).id)
    tally = again.progress.tally
    assert (again.state, tally.inserted + tally.duplicates, tally.rejected) == (JobState.COMPLETED, 50, 0)


def test_a_batch_whose_answer_would_be_too_large_is_written_in_pieces(store, submit, drain):
    """If its reply would be too large, with a long reason for each document, the server closes the connection."""
    columns = [f"c{number:03}" for number in range(200)]
    schema = {"bsonType": "object", "properties": {name: {"bsonType": "double"} for name in columns}}
    store.data.create_collection("records", validator={"$jsonSchema": schema})
    bad = json.dumps(dict.fromkeys(columns, "text"))
    [job] = drain(submit(f"{bad}\n".encode() * 1000 + b'{"good":1}\n', max_errors=2000).id, seconds=120)
    tally = job.progress.tally
    assert (job.state, tally.inserted, tally.rejected) == (JobState.COMPLETED, 1, 1000)


@pytest.mark.parametrize(("share", "bad", "state"), [("0.57%", 57, "COMPLETED"), ("0.57%", 58, "FAILED")])
def test_a_percentage_is_judged_exactly(submit, drain, share, bad, state):
    data = b"{}\n" * (10_000 - bad) + b"{\n" * bad
    [job] = drain(submit(data, max_errors=share).id)
    assert job.state == state


def test_the_first_byte_that_is_not_blank_decides_in_large_objects_too(store, submit, drain):
    [job] = drain(submit(b"\n" * 300_000 + b'{"a":1}\n' * 1000, "unnamed.dat").id)
    assert job.plan.format is Format.NDJSON
    assert store.data["records"].count_documents({"a": 1}) == 1000


def test_a_text_with_a_run_of_nul_is_a_text(submit, drain):
    [job] = drain(submit(b"start\n" + bytes(5000) + b"\nend\n", "cut.log").id)
    assert (job.state, job.progress.tally.inserted) == (JobState.COMPLETED, 3)


def test_a_job_that_cannot_be_read_holds_up_no_other(store, submit, drain):
    odd = submit(b"{}\n", priority=5)
    store.jobs.update_one({"_id": ObjectId(odd.id)}, {"$set": {"options.format": "of a version to come"}})
    [job] = drain(submit(b"{}\n").id)
    assert job.state is JobState.COMPLETED
    assert store.jobs.find_one({"_id": ObjectId(odd.id)})["state"] == "PENDING"


@pytest.mark.parametrize("validate", [False, True])
def test_what_a_collection_says_of_itself_may_name_dates_that_python_has_not(store, submit, drain, validate):
    beyond = DatetimeMS(2**60)
    there = store.data.create_collection("records", validator={"$or": [{"until": None}, {"until": {"$gt": beyond}}]})
    there.create_index("until", partialFilterExpression={"until": {"$gt": beyond}})
    [job] = drain(submit(b'{"n":1}\n{"until":1}\n', validate=validate).id)
    assert (job.state, job.progress.tally.inserted, job.progress.tally.rejected) == (JobState.COMPLETED, 1, 1)


@pytest.mark.parametrize("validate", [False, True])
def test_what_others_stored_may_be_what_python_cannot_read(store, submit, drain, queue, validate):
    bad_text = bson.encode({"_id": 2, "text": "zz"}).replace(b"zz", b"\xff\xfe")
    beyond = DatetimeMS(2**60)
    store.data["records"].insert_many([{"_id": beyond}, {"_id": 1, "at": beyond}, RawBSONDocument(bad_text)])
    job = submit(b'{"_id":1}\n{"_id":2}\n{"n":3}\n', validate=validate)
    again = queue.submit(job.source, job.options)
    for found in (*drain(job.id), *drain(again.id)):
        tally = found.progress.tally
        assert (found.state, tally.inserted + tally.duplicates, tally.rejected) == (JobState.COMPLETED, 1, 2)
