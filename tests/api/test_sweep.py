"""The sweep of unfinished uploads after a day, on a real MongoDB and S3."""

import contextlib
import uuid

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from engine.errors import NotFound, Transient
from engine.s3.direct import DirectUploads
from engine.s3.objects import Objects

MIB = 1024 * 1024


def a_day_later(live, which, stamp="createdAt"):
    live.store.uploads.update_many(which, [{"$set": {stamp: {"$subtract": [f"${stamp}", 25 * 3600 * 1000]}}}])


def test_unfinished_uploads_are_swept_after_a_day(live):
    asked = {"fileName": "big file.ndjson", "size": MIB}
    old, young = (live.http.post("/uploads", json=asked).json()["uploadId"] for _ in range(2))
    a_day_later(live, {"_id": old})
    assert DirectUploads(live.store, live.s3, live.objects, 8 * MIB).sweep() == 1
    assert live.http.get(f"/uploads/{old}").status_code == 404
    assert live.http.delete(f"/uploads/{young}").status_code == 204


def test_uploads_that_a_dead_process_left_are_swept_and_one_that_cannot_be_does_not_keep_the_others(live, monkeypatch):
    uploads = DirectUploads(live.store, live.s3, live.objects, 8 * MIB)
    left = []
    for number in range(3):
        made = live.s3.create_multipart_upload(Bucket=live.bucket, Key=f"left-{number}")["UploadId"]
        with contextlib.suppress(KeyError), uploads.recorded(f"left-{number}", made):
            raise KeyError  # the process dies here
        left.append(made)
    a_day_later(live, {"_id": {"$in": [f"through {made}" for made in left]}})
    real = live.s3.abort_multipart_upload

    def abort(**given):
        if given["Key"] == "left-1":
            raise ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "abort")
        return real(**given)

    monkeypatch.setattr(live.s3, "abort_multipart_upload", abort)
    assert uploads.sweep(lambda: False) == 0
    assert uploads.sweep() == 2
    monkeypatch.undo()
    # It is not tried again for a day: otherwise uploads like it could crowd out all others.
    assert uploads.sweep() == 0
    a_day_later(live, {"key": "left-1"}, "keptAt")
    assert uploads.sweep() == 1
    there = live.s3.list_multipart_uploads(Bucket=live.bucket).get("Uploads", [])
    assert not {found["UploadId"] for found in there} & set(left)


def test_what_was_completed_is_forgotten_a_day_later_however_much_there_is(live, monkeypatch):
    """`SWEEP_UPLOADS` limits what one sweep aborts, but not the records of completed uploads that it deletes."""
    monkeypatch.setattr("engine.s3.direct.SWEEP_UPLOADS", 2)
    uploads = DirectUploads(live.store, live.s3, live.objects, 8 * MIB)
    for number in range(5):
        live.store.uploads.insert_one({"_id": f"done-{number}", "done": {"etag": "e", "size": 1}})
    live.store.uploads.update_many({"_id": {"$regex": "^done-"}}, [{"$set": {"createdAt": "$$NOW"}}])
    assert uploads.sweep() == 0
    assert live.store.uploads.count_documents({"_id": {"$regex": "^done-"}}) == 5
    a_day_later(live, {"_id": {"$regex": "^done-"}})
    assert uploads.sweep() == 0
    assert live.store.uploads.count_documents({"_id": {"$regex": "^done-"}}) == 0


def test_a_sweep_ends_where_s3_does_not_answer(live, monkeypatch):
    uploads = DirectUploads(live.store, live.s3, live.objects, 8 * MIB)
    for number in range(2):
        uploads.begin(f"slow-{number}-{uuid.uuid4().hex}", f"slow-{number}", 5, None)
    a_day_later(live, {"key": {"$regex": "^slow-"}})
    asked = []

    def hang(**given):
        asked.append(given["Key"])
        raise ReadTimeoutError(endpoint_url="here")

    monkeypatch.setattr(live.s3, "abort_multipart_upload", hang)
    with pytest.raises(Transient):
        uploads.sweep()
    assert len(asked) == 1
    monkeypatch.undo()
    assert uploads.sweep() == 2


def test_an_upload_into_a_bucket_of_before_is_not_found_and_swept_there(live):
    live.s3.create_bucket(Bucket="before")
    before = DirectUploads(live.store, live.s3, Objects(live.s3, "before"), 8 * MIB)
    upload_id = f"moved-{uuid.uuid4().hex}"
    before.begin(upload_id, "moved", 5, None)
    now = DirectUploads(live.store, live.s3, live.objects, 8 * MIB)
    with pytest.raises(NotFound):
        now.complete(upload_id)
    a_day_later(live, {"_id": upload_id})
    assert now.sweep() == 1
    assert live.s3.list_multipart_uploads(Bucket="before").get("Uploads", []) == []
    live.s3.delete_bucket(Bucket="before")
