"""Batches of jobs over HTTP, on real servers: their totals, idempotent repeats, and how they end."""

import uuid
from datetime import UTC, datetime

import httpx
import pytest

from engine.control.job_batches import JobBatches
from engine.control.jobs import Ticket
from engine.model import JobOptions
from engine.ports import free_port
from tests.api.conftest import answers, process, put
from tests.running import Running, until


def test_a_batch_sums_its_jobs(live):
    prefix = f"batch-{uuid.uuid4().hex}/"
    keys = [put(live, b'{"n":1}\n{"n":2}\nbad\n', f"{prefix}{n}.ndjson") for n in range(7)]
    answer = live.http.post("/process", json={"prefix": prefix, "collection": "batch"})
    assert (answer.status_code, answer.json()["jobs"]) == (202, 7)
    place = answer.headers["Location"]
    told = until(
        lambda: (t := live.http.get(place).json())["status"] != "PROCESSING" and t, what="the end of the batch"
    )
    assert (told["status"], told["states"]["COMPLETED"]) == ("COMPLETED", 7)
    assert (told["lines"], told["inserted"], told["rejected"]) == (21, 14, 7)
    page = live.http.get("/jobs", params={"batch": told["batchId"]}).json()
    assert sorted(job["fileKey"] for job in page["jobs"]) == sorted(keys)
    some = live.http.post("/process", json={"fileKeys": keys[:3], "collection": "batch"}).json()
    assert some["jobs"] == 3


def test_a_batch_with_an_object_that_is_not_there_makes_no_job(live):
    before = live.store.jobs.count_documents({})
    answer = live.http.post("/process", json={"fileKeys": [put(live), "nowhere"]})
    assert answer.status_code == 404
    assert "'nowhere'" in answer.json()["detail"]
    assert answer.json()["detail"].endswith("; no job was created")
    assert live.http.post("/process", json={"prefix": f"{uuid.uuid4().hex}/"}).status_code == 404
    assert live.store.jobs.count_documents({}) == before


def test_a_key_that_no_object_can_have_is_told_by_its_place(live):
    answer = live.http.post("/process", json={"fileKeys": [put(live), "x" * 1025]})
    assert (answer.status_code, answer.json()["detail"][:11]) == (422, "fileKeys.1:")


@pytest.mark.parametrize(
    "body", [{}, {"prefix": "a", "fileKeys": ["b"]}, {"fileKeys": []}, {"prefix": 5}, {"fileKeys": [5]}]
)
def test_a_batch_names_either_a_prefix_or_keys(live, body):
    assert live.http.post("/process", json=body).status_code == 422


def test_a_batch_is_safe_to_repeat(live):
    keys = [put(live) for _ in range(5)]
    name = {"Idempotency-Key": uuid.uuid4().hex}
    body = {"fileKeys": keys, "collection": "repeat"}
    ids = {live.http.post("/process", json=body, headers=name).json()["batchId"] for _ in range(4)}
    assert len(ids) == 1
    assert live.store.jobs.count_documents({"source.key": {"$in": keys}}) == 5
    assert live.http.post("/process", json=body | {"priority": 1}, headers=name).status_code == 422


def test_a_batch_by_prefix_is_safe_to_repeat_whatever_came_or_went_since(live):
    prefix, name = f"again-{uuid.uuid4().hex}/", {"Idempotency-Key": uuid.uuid4().hex}
    keys = [put(live, key=f"{prefix}{n}.ndjson") for n in range(3)]
    body = {"prefix": prefix, "collection": "again"}
    first = live.http.post("/process", json=body, headers=name).json()
    put(live, key=f"{prefix}more.ndjson")
    again = live.http.post("/process", json=body, headers=name).json()
    assert (again["batchId"], again["jobs"]) == (first["batchId"], 3)
    until(
        lambda: live.http.get(f"/batches/{first['batchId']}").json()["status"] == "COMPLETED",
        what="the end of the batch",
    )
    for key in [*keys, f"{prefix}more.ndjson"]:
        live.objects.delete(key)
    assert live.http.post("/process", json=body, headers=name).json()["batchId"] == first["batchId"]
    assert live.store.jobs.count_documents({"source.key": {"$regex": f"^{prefix}"}}) == 3


def test_a_batch_that_is_sent_twice_at_a_time_has_the_jobs_that_it_counts(live):
    prefix = uuid.uuid4().hex
    sources = [live.objects.head(put(live, key=f"{prefix}/{number}.ndjson")) for number in range(2)]
    # Both have looked for a batch with this key and found none; then an object is added under the prefix.
    ticket, batches = Ticket(uuid.uuid4().hex, "digest"), JobBatches(live.store)
    options = JobOptions(run_at=datetime(2099, 1, 1, tzinfo=UTC))
    first = batches.submit(sources[:1], options, ticket)
    assert batches.submit(sources, options, ticket) == first
    assert first.count == live.store.jobs.count_documents({"source.key": {"$regex": f"^{prefix}"}}) == 1
    for job in live.http.get("/jobs", params={"batch": first.id}).json()["jobs"]:
        live.http.post(f"/jobs/{job['jobId']}/cancel")


def test_a_batch_whose_caller_died_over_it_is_made_whole_by_its_repeat(live):
    name = {"Idempotency-Key": uuid.uuid4().hex}
    body = {"fileKeys": [put(live) for _ in range(4)], "collection": "whole", "runAt": "2099-01-01T00:00:00Z"}
    batch = live.http.post("/process", json=body, headers=name).json()["batchId"]
    live.store.jobs.delete_many({"source.key": {"$in": body["fileKeys"][:2]}})
    assert live.http.post("/process", json=body, headers=name).json()["batchId"] == batch
    told = live.http.get(f"/batches/{batch}").json()
    assert (told["jobs"], told["states"]["PENDING"]) == (4, 4)
    for job in live.http.get("/jobs", params={"batch": batch}).json()["jobs"]:
        live.http.post(f"/jobs/{job['jobId']}/cancel")


def test_a_batch_whose_history_is_pruned_is_over(live):
    from engine.control.ledger import Ledger
    from engine.control.retention import Retention

    keys = [put(live) for _ in range(2)]
    batch = live.http.post("/process", json={"fileKeys": keys, "collection": "pruned"}).json()["batchId"]
    place = f"/batches/{batch}"
    until(lambda: live.http.get(place).json()["status"] == "COMPLETED", what="the end of the batch")
    old = [{"$set": {"finishedAt": {"$subtract": ["$$NOW", 864e5 * 40]}}}]
    retention = Retention(live.store, Ledger(live.store, 30))
    live.store.jobs.update_one({"source.key": keys[0]}, old)
    retention.prune(30, 9)
    told = live.http.get(place).json()
    assert (told["status"], told["states"]["COMPLETED"]) == ("COMPLETED", 1)
    live.store.jobs.update_one({"source.key": keys[1]}, old)
    retention.prune(30, 9)
    assert live.http.get(place).status_code == 404


def test_no_more_jobs_are_let_in_than_may_be_open_batch_by_batch(live, settings, tmp_path):
    port = free_port()
    api = Running("api", live.settings, tmp_path / "api.log", port=port, api_max_open_jobs=5)
    keys = [put(live) for _ in range(4)]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until(lambda: answers(http), what="the API's first answer")
            body = {"fileKeys": keys, "runAt": "2099-01-01T00:00:00Z"}
            found = [http.post("/process", json=body) for _ in range(3)]
            found += [http.post(f"/process/{keys[0]}", json={"runAt": "2099-01-01T00:00:00Z"}) for _ in range(3)]
            made = [answer.status_code for answer in found].count(202)
            assert {answer.status_code for answer in found} == {202, 503}
            assert all(answer.headers["Retry-After"] for answer in found if answer.status_code == 503)
            whole = http.post("/process", json=body | {"fileKeys": [*keys, put(live), put(live)]})
            assert (whole.status_code, "API_MAX_OPEN_JOBS=5" in whole.json()["detail"]) == (422, True)
            mine = live.store.jobs.count_documents({"source.key": {"$in": keys}, "open": True})
            assert made >= 1
            assert mine <= 5
    finally:
        for job in live.store.jobs.find({"source.key": {"$in": keys}}, {"_id": 1}):
            live.http.post(f"/jobs/{job['_id']}/cancel")
        api.end()


def test_a_retry_is_let_in_like_a_new_job_unless_the_job_is_open(live, settings, tmp_path):
    ids = [process(live, put(live), runAt="2099-01-01T00:00:00Z").json()["jobId"] for _ in range(2)]
    live.http.post(f"/jobs/{ids[0]}/cancel")
    port = free_port()
    api = Running("api", live.settings, tmp_path / "api.log", port=port, api_max_open_jobs=1)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until(lambda: answers(http), what="the API's first answer")
            refused, open_already = [http.post(f"/jobs/{job_id}/retry") for job_id in ids]
            assert (refused.status_code, "API_MAX_OPEN_JOBS" in refused.json()["detail"]) == (503, True)
            assert open_already.status_code == 202
            assert live.http.post(f"/jobs/{ids[0]}/retry").status_code == 202
    finally:
        for job_id in ids:
            live.http.post(f"/jobs/{job_id}/cancel")
        api.end()
