"""Uploads whose bytes go straight to S3, and the calls for files, on real servers."""

import hashlib
import io
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import httpx
import pytest
from botocore.exceptions import CredentialRetrievalError
from bson import ObjectId

from engine.errors import TokenExpired, Transient
from engine.s3.direct import DirectUploads
from tests.running import until

MIB = 2**20


def begin(live, **body):
    answer = live.http.post("/uploads", json={"fileName": "big file.ndjson"} | body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def put(state, number, data):
    url = next(part["url"] for part in state["urls"] if part["partNumber"] == number)
    answer = httpx.put(url, content=data, headers=state["headers"], timeout=60)
    assert answer.status_code == 200, answer.text


def parts(live):
    return live.s3.list_multipart_uploads(Bucket=live.bucket).get("Uploads", [])


def test_parts_go_to_s3_and_become_the_object(live, finish):
    data = b"".join(b'{"n":%d}\n' % (10**6 + n) for n in range(900_000))
    state = begin(live, size=len(data), partBytes=5 * MIB)
    assert (state["partBytes"], state["parts"]) == (5 * MIB, -(-len(data) // (5 * MIB)))
    for number in range(1, state["parts"] + 1):
        put(state, number, data[(number - 1) * 5 * MIB : number * 5 * MIB])
    done = live.http.post(f"/uploads/{state['uploadId']}/complete")
    assert (done.status_code, done.json()["size"]) == (201, len(data))
    assert live.s3.get_object(Bucket=live.bucket, Key=done.json()["fileKey"])["Body"].read() == data
    assert live.http.get(f"/uploads/{state['uploadId']}").status_code == 404
    job = live.http.post(f"/process/{done.json()['fileKey']}", json={"collection": "direct"}).json()
    assert finish(job["jobId"])["progress"]["inserted"] == 900_000


def test_an_upload_tells_what_is_there_and_where_to_send_the_rest(live):
    state = begin(live, size=12 * MIB, partBytes=5 * MIB)
    put(state, 2, b"b" * 5 * MIB)
    told = live.http.get(f"/uploads/{state['uploadId']}", params={"first": 3, "count": 10}).json()
    digest = hashlib.md5(b"b" * 5 * MIB).hexdigest()
    assert told["stored"] == [{"partNumber": 2, "size": 5 * MIB, "etag": digest}]
    assert [part["partNumber"] for part in told["urls"]] == [3]
    early = live.http.post(f"/uploads/{state['uploadId']}/complete")
    assert (early.status_code, "missing: 1, 3" in early.json()["detail"]) == (409, True)
    put(state, 1, b"a" * 5 * MIB)
    put(told, 3, b"c" * MIB)
    short = live.http.post(f"/uploads/{state['uploadId']}/complete")
    assert (short.status_code, "announced" in short.json()["detail"]) == (409, True)
    put(told, 3, b"c" * 2 * MIB)
    assert live.http.post(f"/uploads/{state['uploadId']}/complete").json()["size"] == 12 * MIB


@pytest.mark.parametrize("size", [None, 12 * MIB])
def test_parts_that_s3_would_not_take_are_named(live, size):
    state = begin(live, partBytes=6 * MIB, **({"size": size} if size else {}))
    put(state, 1, b"x" * 4 * MIB)
    put(state, 2, b"x" * 8 * MIB)
    answer = live.http.post(f"/uploads/{state['uploadId']}/complete")
    assert answer.status_code == 409
    assert ("announced" if size else "smaller than") in answer.json()["detail"]
    assert live.http.delete(f"/uploads/{state['uploadId']}").status_code == 204


def test_an_upload_that_cannot_be_recorded_leaves_nothing(live, monkeypatch):
    uploads, before = DirectUploads(live.store, live.s3, live.objects, 8 * MIB), len(parts(live))

    def fail(*_, **__):
        raise Transient("no primary")

    monkeypatch.setattr(uploads, "_record", fail)
    with pytest.raises(Transient, match="no primary"):
        uploads.begin(uuid.uuid4().hex, "unrecorded", MIB, None)
    assert len(parts(live)) == before


@pytest.mark.parametrize("dots", ["x/%2E%2E/", "%2E/", "x/y/%2E%2E/%2E%2E/"])
def test_a_key_with_dots_is_no_other(live, dots):
    """Encoded dots in a path are part of the key; resolved, they would lead to another object."""
    key = live.objects.upload(io.BytesIO(b"{}\n"), f"dots-{uuid.uuid4().hex}").key
    assert live.http.get(f"/files/{key}").status_code == 200
    assert live.http.get(f"/files/{dots}{key}").status_code == 404
    assert live.http.post(f"/process/{dots}{key}").status_code == 404


def test_completing_is_safe_to_repeat_also_where_nobody_got_to_write_it_down(live):
    """An API may die after S3 has completed an upload and before that is recorded."""
    state = begin(live, size=MIB)
    put(state, 1, b"x" * MIB)
    path = f"/uploads/{state['uploadId']}/complete"
    first = live.http.post(path)
    live.store.uploads.update_one({"_id": state["uploadId"]}, {"$unset": {"done": True}})
    second = live.http.post(path)
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json() == live.http.post(path).json()


def test_two_that_complete_an_upload_at_once_are_told_the_same(live):
    def completed(path):
        # Again, since S3 may forget an upload a moment before it shows the object.
        return until(lambda: (answer := live.http.post(path)).status_code == 201 and answer, what="a good answer")

    for _ in range(5):
        state = begin(live, size=MIB)
        put(state, 1, b"x" * MIB)
        path = f"/uploads/{state['uploadId']}/complete"
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(completed, [path] * 4))
        assert {answer.json()["fileKey"] for answer in answers} == {state["fileKey"]}


@pytest.mark.parametrize("end", ["abort", "delete"])
def test_an_upload_that_is_given_up_leaves_nothing(live, end):
    before = len(parts(live))
    state = begin(live, size=MIB)
    put(state, 1, b"x" * MIB)
    path = f"/uploads/{state['uploadId']}"
    answer = live.http.post(f"{path}/abort") if end == "abort" else live.http.delete(path)
    assert answer.status_code == 204
    assert len(parts(live)) == before
    assert live.http.post(f"{path}/complete").status_code == 404


def test_an_upload_that_was_completed_is_not_given_up_also_where_nobody_got_to_write_it_down(live):
    """An API may die after S3 has completed an upload and before that is recorded."""
    state = begin(live, size=MIB)
    put(state, 1, b"x" * MIB)
    path = f"/uploads/{state['uploadId']}"
    stored = live.http.post(f"{path}/complete").json()
    live.store.uploads.update_one({"_id": state["uploadId"]}, {"$unset": {"done": True}})
    refused = live.http.delete(path)
    assert (refused.status_code, stored["fileKey"] in refused.json()["detail"]) == (409, True)
    assert live.http.get(f"/files/{stored['fileKey']}").status_code == 200
    assert live.http.post(f"{path}/complete").json() == stored


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CredentialRetrievalError(provider="a role", error_msg="away"), Transient),
        (RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired."), TokenExpired),
    ],
)
def test_credentials_that_cannot_be_had_while_urls_are_signed_are_told(live, monkeypatch, error, told):
    uploads = DirectUploads(live.store, live.s3, live.objects, 5 * MIB)
    upload = uploads.begin(uuid.uuid4().hex, "signed.ndjson", MIB, None)
    monkeypatch.setattr(live.s3, "generate_presigned_url", Mock(side_effect=error))
    with pytest.raises(told):
        uploads.urls(upload, 1, 1)
    uploads.abort(upload.id)


@pytest.mark.parametrize(
    "body",
    [{}, {"fileName": 5}, {"fileName": ""}, {"fileName": "a", "size": -1}, {"fileName": "a", "partBytes": 1}, {"x": 1}],
)
def test_a_wrong_upload_is_named(live, body):
    assert live.http.post("/uploads", json=body).status_code == 422


def test_files_are_listed_looked_at_and_deleted(live, finish):
    prefix = f"files-{uuid.uuid4().hex}/"
    keys = [live.objects.upload(io.BytesIO(b"{}\n"), f"{prefix}{n}/ü x.ndjson").key for n in range(5)]
    first = live.http.get("/files", params={"prefix": prefix, "limit": 3}).json()
    rest = live.http.get("/files", params={"prefix": prefix, "limit": 3, "cursor": first["next"]}).json()
    assert [file["fileKey"] for file in first["files"] + rest["files"]] == keys
    assert (first["bucket"], rest["next"]) == (live.bucket, None)
    job_id = live.http.post(f"/process/{keys[0]}", json={"collection": "files"}).json()["jobId"]
    finish(job_id)
    told = live.http.get(f"/files/{keys[0]}").json()
    assert (told["fileKey"], told["size"], [job["jobId"] for job in told["jobs"]]) == (keys[0], 3, [job_id])
    assert live.http.delete(f"/files/{keys[0]}").status_code == 204
    assert live.http.get(f"/files/{keys[0]}").status_code == 404
    assert live.http.delete(f"/files/{keys[0]}").status_code == 404


def test_slashes_before_the_first_name_of_a_path_name_no_other_file(live):
    key = f"slashes-{uuid.uuid4().hex}.ndjson"
    for each in (key, f"files/{key}"):
        live.objects.upload(io.BytesIO(b"{}\n"), each)
    api = f"http://127.0.0.1:{live.port}"
    for path in ("/files/", "//files/", "///files/"):
        assert live.http.get(f"{api}{path}{key}").json()["fileKey"] == key
    assert live.http.delete(f"{api}//files/{key}").status_code == 204
    assert live.http.get(f"{api}/files/files/{key}").status_code == 200


def test_a_file_that_an_open_job_needs_is_not_deleted(live):
    key = live.objects.upload(io.BytesIO(b"{}\n"), f"needed-{uuid.uuid4().hex}").key
    job_id = live.http.post(f"/process/{key}", json={"runAt": "2099-01-01T00:00:00Z"}).json()["jobId"]
    answer = live.http.delete(f"/files/{key}")
    assert (answer.status_code, job_id in answer.json()["detail"]) == (409, True)
    # The same key in the bucket of another API on this queue is another object.
    found = {"_id": ObjectId(job_id)}
    live.store.jobs.update_one(found, {"$set": {"source.bucket": "another"}})
    assert live.http.get(f"/files/{key}").json()["jobs"] == []
    assert live.http.delete(f"/files/{key}").status_code == 204
    live.objects.upload(io.BytesIO(b"{}\n"), key)
    live.store.jobs.update_one(found, {"$set": {"source.bucket": live.bucket}})
    live.http.post(f"/jobs/{job_id}/cancel")
    assert live.http.delete(f"/files/{key}").status_code == 204


def test_more_uploads_than_allowed_are_told_to_come_again(live):
    answers = []

    def send():
        with httpx.Client(base_url=live.http.base_url, timeout=120) as http:
            answers.append(http.post("/upload", files={"file": ("a", b"x" * 30 * MIB)}))

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {201, 503}
    assert sum(answer.status_code == 201 for answer in answers) >= 4
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 503)
    assert live.http.post("/upload", files={"file": ("a", b"x")}).status_code == 201
