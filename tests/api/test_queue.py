"""The queue over HTTP, on real servers: lists, details, idempotent repeats, schedules, deadlines, pauses, dry runs."""

import os
import signal
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from bson import ObjectId

from tests.api.conftest import process, put, reported, slow_inserts
from tests.running import title, until


def test_jobs_are_listed_newest_first_by_pages_and_filters(live, finish):
    name = uuid.uuid4().hex
    key = put(live)
    ids = [process(live, key, collection=name).json()["jobId"] for _ in range(5)]
    for job_id in ids:
        finish(job_id)
    page = live.http.get("/jobs", params={"collection": name, "limit": 3}).json()
    assert [job["jobId"] for job in page["jobs"]] == ids[:1:-1]
    rest = live.http.get("/jobs", params={"collection": name, "limit": 3, "cursor": page["next"]}).json()
    assert ([job["jobId"] for job in rest["jobs"]], rest["next"]) == (ids[1::-1], None)
    assert len(live.http.get("/jobs", params={"file": key}).json()["jobs"]) == 5
    assert live.http.get("/jobs", params={"file": key, "status": "FAILED"}).json()["jobs"] == []


@pytest.mark.parametrize("path", ["/files?prefix=caf%e9", "/jobs?file=%ff", "/jobs?%ff=x"])
def test_a_query_that_is_no_utf8_is_not_taken_for_another(live, path):
    answer = live.http.get(path)
    assert (answer.status_code, "UTF-8" in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    "query",
    [
        {"status": "DONE"},
        {"limit": 0},
        {"limit": "x"},
        {"limit": 10**9},
        {"cursor": "x"},
        {"batch": "x"},
        {"colour": "red"},
        {"file": ""},
    ],
)
def test_a_wrong_filter_is_named(live, query):
    answer = live.http.get("/jobs", params=query)
    assert answer.status_code == 422
    assert next(iter(query)) in answer.json()["detail"]
    assert "pattern" not in answer.json()["detail"]


def test_a_job_tells_its_ranges_and_what_happened(live, finish):
    job_id = process(live, put(live, b'{"n":1}\nbad\n')).json()["jobId"]
    finish(job_id)
    told = live.http.get(f"/jobs/{job_id}").json()
    assert told["ranges"] == {"DONE": 1}
    assert (told["attempts"], told["deaths"], len(told["workers"])) == (0, 0, 1)
    asked = tuple(told[name] for name in ("maxErrors", "ifLoaded", "force", "timeoutSeconds"))
    assert asked == (1000, "load", False, None)
    assert told["waitingFor"] is None
    assert [event["what"] for event in told["timeline"]] == ["submitted", "planned: 1 range", "COMPLETED"]
    status = live.http.get(f"/status/{job_id}").json()
    assert {name: told[name] for name in status} == status


def test_a_thousand_repeats_at_once_with_one_key_make_one_job(live):
    key, name = put(live), {"Idempotency-Key": uuid.uuid4().hex}
    ids, failed = set(), []

    def send():
        with httpx.Client(base_url=live.http.base_url, timeout=120) as http:
            for _ in range(50):
                while (
                    answer := http.post(f"/process/{key}", json={"collection": "once"}, headers=name)
                ).status_code == 503:
                    time.sleep(0.1)  # so many are more than a server whose database stands still keeps waiting
                if answer.status_code == 202:
                    ids.add(answer.json()["jobId"])
                else:
                    failed.append(answer.text)

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(ids), failed) == (1, [])
    assert live.store.jobs.count_documents({"source.key": key}) == 1


def test_the_same_idempotency_key_with_another_request_is_refused(live):
    key, name = put(live), {"Idempotency-Key": uuid.uuid4().hex}
    first = process(live, key, name, collection="one").json()
    assert process(live, key, name, collection="one").json()["jobId"] == first["jobId"]
    for answer in (process(live, key, name, collection="two"), process(live, put(live), name, collection="one")):
        assert (answer.status_code, answer.json()["type"]) == (422, "urn:headrace:problem:idempotency_key_reused")
    assert process(live, key, {"Idempotency-Key": "with space"}).status_code == 422
    made = live.store.jobs.find_one({"ticket.key": {"$regex": name["Idempotency-Key"]}})
    # Another API that shares the queue may receive the same key.
    assert made["ticket"]["key"].startswith(f"{live.objects.bucket}:{live.store.data.name}:")


def test_a_job_does_not_run_before_its_time(live, finish):
    at = datetime.now(UTC) + timedelta(seconds=2.5)
    job_id = process(live, put(live), runAt=at.isoformat()).json()["jobId"]
    time.sleep(1)
    early = live.http.get(f"/status/{job_id}").json()["status"]
    assert early == "PENDING" or datetime.now(UTC) >= at  # on a machine that is very busy
    told = finish(job_id)
    assert told["status"] == "COMPLETED"
    assert datetime.fromisoformat(told["startedAt"]) >= at - timedelta(milliseconds=5)


@pytest.mark.parametrize(
    "at",
    [
        "tomorrow",
        5,
        "2026-11-24T09:00:00",
        "2026-11-24 09:00:00Z",
        "20261124T090000Z",
        "2026-02-30T09:00:00Z",
        "0001-01-01T00:00:00Z",
        {"$gt": 1},
        "",
    ],
)
def test_a_time_that_is_none_is_named(live, at):
    answer = process(live, put(live), runAt=at)
    assert (answer.status_code, "runAt" in answer.json()["detail"]) == (422, True)


def test_a_job_that_runs_too_long_fails_and_goes_on_when_retried(live, finish):
    lines = 300_000  # 300 batches, eight at a time: more than 15 seconds
    key = put(live, b'{"n":1}\n' * lines)
    with slow_inserts(live, 500):
        job_id = process(live, key, collection="late", timeoutSeconds=1).json()["jobId"]
        told = finish(job_id)
    assert (told["status"], told["error"]["code"]) == ("FAILED", "timeout")
    assert "timeoutSeconds=1" in told["error"]["message"]
    done = [told["progress"]["lines"]]
    assert done[0] < lines
    while told["status"] == "FAILED":
        assert told["error"]["code"] == "timeout"
        assert live.http.post(f"/jobs/{job_id}/retry").status_code == 202
        told = finish(job_id)
        done.append(told["progress"]["lines"])
    assert (told["status"], told["progress"]["inserted"]) == ("COMPLETED", lines)
    assert done == sorted(done)
    assert live.data["late"].count_documents({}) == lines


def test_a_paused_queue_begins_nothing_and_goes_on_when_resumed(live, finish):
    assert live.http.post("/queue/pause").json()["paused"] is True
    try:
        time.sleep(0.7)  # workers reuse a look at the queue for half a second
        job_id = process(live, put(live)).json()["jobId"]
        time.sleep(1)
        assert live.http.get(f"/status/{job_id}").json()["status"] == "PENDING"
        # A count that took long is reused for as much longer.
        queue = until(lambda: (now := live.http.get("/queue").json())["jobs"]["PENDING"] and now, 200, "a new count")
        assert queue["paused"] is True
    finally:
        assert live.http.post("/queue/resume").json()["paused"] is False
    assert finish(job_id)["status"] == "COMPLETED"


def test_a_dry_run_tells_what_a_load_would_and_writes_nothing(live, finish):
    deep = b'{"a":' * 190 + b"1" + b"}" * 190
    deep_id = b'{"_id":' + b'{"a":' * 400 + b"1" + b"}" * 401
    lines = [b'{"u":{"k":%d}}' % n for n in range(100, 150)]
    lines += [
        b"{",
        b"[1]",
        b'{"a":9223372036854775808}',
        b'{"a\\u0000":1}',
        b'{"_id":[1]}',
        b'{"_id":{"$x":1}}',
        deep,
        deep_id,
    ]
    lines += [b'{"a":"%s"}' % (b"x" * (16 * 2**20 + 5)), b" ", b'{"_id":1,"v":2}', b'{"_id":{"a":{"$x":1}}}']
    lines += [b'{"_id":7,"v":1}', b'{"_id":7,"v":1}', b'{"_id":7,"v":2}', b'{"picky":1}', b'{"picky":"no","$a":"$b"}']
    lines += [b'{"u":{"k":1}}', b'{"u":{"k":1},"w":1}', b'{"u":{"k":5}}', b'{"u":{"k":2}}']
    name = f"dry{uuid.uuid4().hex[:8]}"
    live.data.create_collection(name, validator={"picky": {"$not": {"$type": "string"}}})
    live.data[name].create_index([("u.k", 1), ("w", 1)], unique=True)
    live.data[name].insert_one({"_id": 1, "v": 1, "u": {"k": 5}})
    key = put(live, b"\n".join(lines))
    dry = finish(process(live, key, collection=name, validate=True).json()["jobId"])
    assert (dry["status"], dry["validate"]) == ("COMPLETED", True)
    assert live.data[name].count_documents({}) == 1
    assert live.store.sources.count_documents({"source.key": key}) == 0
    real = finish(process(live, key, collection=name).json()["jobId"])
    same = ("lines", "inserted", "duplicates", "rejected", "blank")
    assert {n: dry["progress"][n] for n in same} == {n: real["progress"][n] for n in same}
    found = [live.http.get(f"/jobs/{j['jobId']}/rejects").json()["rejects"] for j in (dry, real)]
    assert [(r["offset"], r["reason"]) for r in found[0]] == [(r["offset"], r["reason"]) for r in found[1]]
    assert real["alreadyLoadedBy"] is None
    again = finish(process(live, key, collection=name, validate=True).json()["jobId"])
    assert again["progress"]["duplicates"] >= 50
    assert again["alreadyLoadedBy"] == real["jobId"]
    until(lambda: live.store.claims.count_documents({}) == 0, what="the release of the claims")


def test_the_workers_tell_what_they_do(live):
    # One that another test has killed is told of for some seconds more.
    workers = until(
        lambda: len(now := live.http.get("/workers").json()["workers"]) == 2 and now, what="a word of both workers"
    )
    assert all(worker["memory"] > 10**6 and worker["pid"] > 1 for worker in workers)


def test_the_metrics_are_those_of_the_whole_fleet(live, finish):
    def figure(name):
        text = live.http.get("/metrics").text
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    # A worker tells of itself every few seconds, so what it did last is in the sums only after its next word.
    records, rejects = figure("headrace_records_total"), figure("headrace_rejects_total")
    finish(process(live, put(live, b'{"n":1}\nbad\n' * 100), collection="metrics").json()["jobId"])
    finish(process(live, put(live, b'{"n":1}\n' * 1000), collection="metrics").json()["jobId"])
    until(lambda: figure("headrace_records_total") >= records + 1100, what="the sum over all workers")
    until(lambda: figure("headrace_rejects_total") >= rejects + 100, what="the rejects of all workers")
    until(lambda: figure('headrace_jobs{state="COMPLETED"}') >= 2, 200, "a new count of the jobs")
    # A worker of another database takes none of these jobs, so it does not count.
    other = live.store.workers.find_one() | {"_id": "elsewhere:1:0:1", "host": "elsewhere", "database": "elsewhere"}
    other["at"] += timedelta(minutes=1)
    live.store.workers.insert_one(other)
    until(lambda: "elsewhere" in live.http.get("/metrics").text, what="the stranger in the metrics")
    assert figure("headrace_workers") == 2
    live.store.workers.delete_one({"_id": "elsewhere:1:0:1"})
    assert figure('headrace_stage_seconds_total{stage="decode"}') > 0
    assert 'headrace_http_request_seconds_count{method="POST",route="/process/{file_key:path}",status="202"}' in (
        live.http.get("/metrics").text
    )


def test_a_job_in_its_only_range_runs_no_longer_than_it_may(live, finish):
    key = put(live, b'{"n":1}\n' * 100_000)  # 800 kB, one range for an engine with ranges of 1 MiB
    with slow_inserts(live, 700):
        told = finish(process(live, key, collection="slowly", timeoutSeconds=1).json()["jobId"])
    assert (told["status"], told["error"]["code"]) == ("FAILED", "timeout")
    assert told["progress"]["lines"] < 100_000


def test_a_page_that_is_just_full_is_the_last_one(live):
    batch = live.http.post("/process", json={"fileKeys": [put(live) for _ in range(3)], "collection": "full"}).json()
    page = live.http.get("/jobs", params={"batch": batch["batchId"], "limit": 3}).json()
    assert (len(page["jobs"]), page["next"]) == (3, None)
    page = live.http.get("/jobs", params={"batch": batch["batchId"], "limit": 2}).json()
    assert (len(page["jobs"]), page["next"] is None) == (2, False)


def test_a_job_that_waits_tells_what_for(live, finish):
    key = put(live)

    def waits(job_id):
        return live.http.get(f"/jobs/{job_id}").json()["waitingFor"]

    timed = process(live, key, runAt="2099-01-01T00:00:00Z").json()["jobId"]
    assert waits(timed) == "its start time, 2099-01-01T00:00:00.000Z"
    live.http.post("/queue/pause")
    try:
        time.sleep(0.7)  # workers reuse a look at the queue for half a second
        held = process(live, key, collection="waits").json()["jobId"]
        assert "paused" in waits(held)
    finally:
        live.http.post("/queue/resume")
    finish(held)
    assert waits(held) is None
    live.http.post(f"/jobs/{timed}/cancel")
    assert waits(timed) is None


def test_what_a_job_went_through_is_told_when_it_is_over(live, finish):
    """A worker that is killed mid-job shows in the job's deaths, workers and timeline."""
    key = put(live, b'{"n":1}\n' * 1_500_000)
    job_id = process(live, key, collection="deaths").json()["jobId"]
    victim = until(
        lambda: next((pid for pid in live.engine.workers() if job_id in title(pid)), None), what="a worker at the job"
    )
    os.kill(victim, signal.SIGKILL)
    assert finish(job_id)["status"] == "COMPLETED"
    told = live.http.get(f"/jobs/{job_id}").json()
    assert told["deaths"] >= 1
    assert len(told["workers"]) >= 2
    assert any("freed" in event["what"] for event in told["timeline"])


def test_polling_a_job_reads_no_ranges_and_shows_its_first_rejects_cut_short(live, finish):
    line = b'{"bad":"' + b"x" * 3000 + b"\n"
    job_id = process(live, put(live, b'{"n":1}\n' + line * 9), collection="polled").json()["jobId"]
    told = finish(job_id)
    assert [reject["line"] for reject in told["errors"]] == [2, 3, 4, 5, 6]
    assert {(len(reject["raw"]), reject["rawLength"]) for reject in told["errors"]} == {(1000, len(line) - 1)}
    live.store.ranges.delete_many({"job": ObjectId(job_id)})
    live.store.rejects.delete_many({"_id.job": ObjectId(job_id)})
    assert live.http.get(f"/status/{job_id}").json() == told


def test_dry_runs_are_not_counted_as_records(live, finish):
    def total(name):
        text = live.http.get("/metrics").text
        return next(float(row.split()[-1]) for row in text.splitlines() if row.startswith(f"headrace_{name}_total"))

    reported(live)
    before, lines = total("records"), total("lines")
    finish(process(live, put(live, b'{"n":1}\n' * 700), collection="undone", validate=True).json()["jobId"])
    finish(process(live, put(live, b'{"n":1}\n' * 7), collection="undone").json()["jobId"])
    # A worker reports both numbers at the same time.
    until(lambda: total("lines") >= lines + 707, what="the sum over all workers")
    assert total("records") == before + 7
