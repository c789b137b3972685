"""What holds for objects on a real S3 server (SeaweedFS) and on moto's model of AWS."""

import io
import itertools
import threading
from contextlib import contextmanager, suppress
from unittest.mock import Mock

import boto3
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from moto import mock_aws

from engine.errors import (
    AccessDenied,
    NotFound,
    ObjectChanged,
    ObjectGone,
    Refused,
    StartError,
    TokenExpired,
    Transient,
    WrongClock,
)
from engine.model import Source
from engine.s3.client import connect, s3_translated
from engine.s3.objects import Objects, RangeReader
from engine.settings import Settings

MIB = 1024 * 1024


@pytest.fixture(params=["weed", "moto"])
def s3(request):
    """The objects on SeaweedFS or on moto, the client, and the bucket's name."""
    if request.param == "weed":
        settings = request.getfixturevalue("settings")
        client = connect(settings)
        yield Objects(client, settings.aws_bucket_name, 5 * MIB, 3), client, settings.aws_bucket_name
        return
    with mock_aws():
        settings = Settings.model_validate({"aws_access_key_id": "a", "aws_secret_access_key": "b"})
        boto3.client("s3", "us-east-1").create_bucket(Bucket="bucket")
        client = connect(settings)
        yield Objects(client, "bucket", 5 * MIB, 3), client, "bucket"


@pytest.mark.parametrize(
    ("code", "status", "told", "spends"),
    [
        ("ExpiredToken", 400, TokenExpired, False),
        ("RequestTimeTooSkewed", 403, WrongClock, False),
        ("InvalidArgument", 400, Refused, None),
        ("AccessDenied", 403, AccessDenied, None),
        ("InvalidObjectState", 403, Refused, None),
        ("SlowDown", 503, Transient, True),
    ],
)
def test_what_s3_says_is_told_as_what_it_is(code, status, told, spends):
    with pytest.raises(told) as caught, s3_translated("looking"):
        raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")
    assert type(caught.value) is told
    assert getattr(caught.value, "spends", None) is spends


def put(objects, data, key):
    return objects.upload(io.BytesIO(data), key)


@pytest.mark.parametrize("size", [0, 1, 5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 17 * MIB])
def test_an_upload_of_any_size_is_stored_whole(s3, size):
    objects, client, bucket = s3
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    source = put(objects, data, f"sizes/{size}")
    assert (source.size, source.key) == (size, f"sizes/{size}")
    assert client.get_object(Bucket=bucket, Key=source.key)["Body"].read() == data
    assert objects.head(source.key) == source


@hypothesis_settings(max_examples=30)
@given(data=st.data())
def test_a_ranged_read_gives_exactly_its_bytes(s3, data):
    objects, _, _ = s3
    whole = bytes(range(256)) * 40
    source = put(objects, whole, "ranged")
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    step = data.draw(st.integers(1, 4000))
    with objects.open(source, start, stop) as reader:
        pieces = list(iter(lambda: reader.read(step), b""))
    assert b"".join(pieces) == whole[start:stop]


def test_a_long_read_tells_that_it_moves(s3):
    objects, _, _ = s3
    whole, moves = bytes(range(256)) * 4096 + b"end", []
    source = put(objects, whole, "long")
    with objects.open(source, 0, len(whole)) as reader:
        assert reader.read(len(whole), lambda: moves.append(True)) == whole
    assert 5 < len(moves) < 12


def test_an_object_that_is_overwritten_or_deleted_is_never_read_as_the_one_that_was_pinned(s3):
    objects, client, bucket = s3
    source = put(objects, b"one", "changing")
    put(objects, b"two", "changing")
    with pytest.raises(ObjectChanged, match="changing"):
        objects.open(source, 0, 3)
    put(objects, b"o", "changing")
    with pytest.raises(ObjectChanged):
        objects.open(source, 2, 3)
    client.delete_object(Bucket=bucket, Key="changing")
    with pytest.raises(ObjectGone, match="changing"):
        objects.open(source, 0, 3)


def test_what_is_not_there_is_not_found(s3):
    objects, _, _ = s3
    with pytest.raises(NotFound, match="nowhere"):
        objects.head("nowhere")


@pytest.mark.parametrize("size", [100, 12 * MIB])
def test_an_upload_that_fails_before_its_end_leaves_no_object_and_no_parts(s3, size):
    objects, client, bucket = s3

    def fail():
        raise RuntimeError("the form was cut short")

    with pytest.raises(RuntimeError, match="cut short"):
        objects.upload(io.BytesIO(b"x" * size), "unfinished", before_complete=fail)
    with pytest.raises(NotFound):
        objects.head("unfinished")
    assert client.list_multipart_uploads(Bucket=bucket, Prefix="unfinished").get("Uploads", []) == []


def test_a_stream_that_breaks_off_leaves_nothing_and_room_for_the_next(s3):
    objects, client, bucket = s3

    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 11 * MIB:
                raise OSError("gone")
            return super().read(size)

    for _ in range(3):
        with pytest.raises(Exception, match=r"gone|OSError"):
            objects.upload(Broken(b"x" * 20 * MIB), "broken")
    with pytest.raises(NotFound):
        objects.head("broken")
    assert client.list_multipart_uploads(Bucket=bucket, Prefix="broken").get("Uploads", []) == []
    assert objects.upload(io.BytesIO(b"x" * 20 * MIB), "whole").size == 20 * MIB


def test_however_many_uploads_there_are_only_so_many_parts_are_in_memory(s3):
    objects, _, _ = s3
    held, most, lock = [0], [0], threading.Lock()

    class Counted(bytes):
        def __new__(cls, data):
            with lock:
                held[0] += 1
                most[0] = max(most[0], held[0])
            return super().__new__(cls, data)

        def __del__(self):
            with lock:
                held[0] -= 1

    class Source(io.BytesIO):
        def read(self, size=-1):
            data = super().read(size)
            return Counted(data) if data else data

    threads = [
        threading.Thread(target=objects.upload, args=(Source(b"x" * 60 * MIB), f"many-{number}")) for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [objects.head(f"many-{number}").size for number in range(4)] == [60 * MIB] * 4
    # Parts in flight, the first part of each upload until it is sent, and one or two that are about to be freed.
    assert 0 < most[0] <= 4 + 4 + 2


def test_an_upload_whose_last_answer_is_lost_is_there_and_told_so(s3, monkeypatch):
    objects, client, bucket = s3
    real = client.complete_multipart_upload

    def complete(**given):
        real(**given)
        raise ConnectionClosedError(endpoint_url="s3")

    monkeypatch.setattr(client, "complete_multipart_upload", complete)
    assert put(objects, b"x" * 12 * MIB, "heard/of").size == 12 * MIB
    assert client.get_object(Bucket=bucket, Key="heard/of")["ContentLength"] == 12 * MIB


@pytest.mark.parametrize("call", ["put_object", "head_object"])
def test_an_upload_whose_answer_is_lost_leaves_no_object_that_nobody_knows_of(s3, monkeypatch, call):
    objects, client, bucket = s3
    real = getattr(client, call)

    def lose(**given):
        with suppress(ClientError):
            real(**given)
        raise ConnectionClosedError(endpoint_url="s3")

    with monkeypatch.context() as patch:
        patch.setattr(client, call, lose)
        with pytest.raises(Transient, match="ConnectionClosedError"):
            put(objects, b"x" * 100, "lost")
    assert "Contents" not in client.list_objects_v2(Bucket=bucket, Prefix="lost")


def test_why_an_upload_failed_is_told_whatever_comes_of_the_rest_of_it(s3, monkeypatch):
    objects, client, _ = s3

    def fail(**given):
        raise ConnectionClosedError(endpoint_url="s3")

    put(objects, b"y" * 12 * MIB, "old")  # not to be mistaken for the next upload's object
    monkeypatch.setattr(client, "complete_multipart_upload", fail)
    monkeypatch.setattr(client, "abort_multipart_upload", fail)
    with pytest.raises(Transient, match="ConnectionClosedError"):
        put(objects, b"x" * 12 * MIB, "old")


def refused(code, status):
    """A method of the client that fails as if S3 had answered with this code and status."""

    def answer(**given):
        raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "answer")

    return answer


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("ExpiredToken", 400, TokenExpired),
        ("RequestTimeTooSkewed", 403, WrongClock),
        ("InvalidKey", 400, NotFound),
        ("AccessDenied", 403, AccessDenied),
        ("InvalidToken", 400, AccessDenied),
        ("AuthorizationHeaderMalformed", 400, AccessDenied),
        ("IllegalLocationConstraintException", 400, AccessDenied),
        ("KMS.DisabledException", 400, AccessDenied),
    ],
)
def test_an_answer_without_a_body_is_not_taken_for_an_object_that_is_not_there(s3, monkeypatch, code, status, told):
    objects, client, _ = s3
    monkeypatch.setattr(client, "head_object", refused(str(status), status))
    monkeypatch.setattr(client, "get_object", refused(code, status))
    with pytest.raises(told):
        objects.head("there")


@pytest.mark.parametrize(
    ("code", "status", "told"), [("ExpiredToken", 400, TokenExpired), ("RequestTimeTooSkewed", 403, WrongClock)]
)
def test_a_bucket_that_does_not_say_why_it_cannot_be_seen_is_asked_again(s3, monkeypatch, code, status, told):
    objects, client, _ = s3
    monkeypatch.setattr(client, "head_bucket", refused(str(status), status))
    monkeypatch.setattr(client, "list_objects_v2", refused(code, status))
    with pytest.raises(told):
        objects.check()
    with pytest.raises(told):
        objects.time()
    monkeypatch.undo()
    monkeypatch.setattr(client, "head_bucket", refused("403", 403))
    with pytest.raises(AccessDenied):
        objects.check()


@pytest.mark.parametrize(
    ("version", "code", "status", "told", "said"),
    [
        ("v1", "AccessDenied", 403, AccessDenied, "s3:GetObjectVersion"),
        ("", "AccessDenied", 403, AccessDenied, "their permissions"),
        ("", "NoSuchKey", 404, ObjectGone, "was deleted"),
        ("", "NoSuchBucket", 404, Transient, "no such bucket"),
    ],
)
def test_an_object_that_cannot_be_read_says_what_is_missing(s3, monkeypatch, version, code, status, told, said):
    objects, client, bucket = s3
    monkeypatch.setattr(client, "get_object", refused(code, status))
    with pytest.raises(told, match=said) as caught:
        objects.open(Source(bucket, "key", '"etag"', version, 10), 0, 10)
    assert type(caught.value) is told


def test_a_client_is_not_made_without_credentials(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Transient, match="AWS_ACCESS_KEY_ID"):
        connect(Settings.model_validate({"aws_endpoint_url": "http://127.0.0.1:1"}))


def test_settings_of_aws_that_are_wrong_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "nope")
    with pytest.raises(StartError, match="nope"):
        connect(Settings.model_validate({"aws_access_key_id": "a", "aws_secret_access_key": "b"}))


def test_a_host_that_the_sdk_does_not_take_is_told():
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    with pytest.raises(StartError, match="http://seaweed_s3:8333"):
        connect(Settings.model_validate(keys | {"aws_endpoint_url": "http://seaweed_s3:8333"}))


def test_a_server_on_this_machine_is_not_looked_for_behind_a_proxy(settings, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    Objects(connect(settings), settings.aws_bucket_name).check()
    elsewhere = settings.model_copy(update={"aws_endpoint_url": "http://s3.invalid:1"})
    with pytest.raises(Transient, match="ProxyConnectionError"):
        Objects(connect(elsewhere), settings.aws_bucket_name).check()


def test_a_token_without_keys_does_not_hide_those_that_the_sdk_finds(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = AKIAFROMFILE\naws_secret_access_key = s\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    client = connect(Settings.model_validate({"aws_session_token": "t", "aws_endpoint_url": "http://127.0.0.1:1"}))
    signed = client.generate_presigned_url(
        "upload_part", Params={"Bucket": "b", "Key": "k", "UploadId": "u", "PartNumber": 1}
    )
    assert "AKIAFROMFILE" in signed


def test_what_is_left_of_an_answer_that_has_become_slow_is_not_waited_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("engine.s3.objects.time.monotonic", lambda: now[0])

    class Body:
        slow = closed = False

        def read(self, size):
            now[0] += size / 1000 if self.slow else 0
            return b"x" * size

        def close(self):
            self.closed = True

    for slow, closed in ((True, True), (False, False)):
        body = Body()
        reader = RangeReader({"Body": body}, "key", 0, 2**20)
        reader.read(2**20 - 2**17)
        body.slow = slow
        now[0] = 0.0
        reader.close()
        assert (now[0] < 20, body.closed) == (True, closed)


def test_of_a_body_that_trickles_less_is_waited_for_at_a_time(monkeypatch):
    now, asked, moves = [0.0], [], []
    monkeypatch.setattr("engine.s3.objects.time.monotonic", lambda: now[0])

    class Body:
        def read(self, size):
            asked.append(size)
            now[0] += size / 1000  # 1000 bytes a second
            return b"x" * size

    reader = RangeReader({"Body": Body()}, "key", 0, 2**20)
    assert len(reader.read(2**16, lambda: moves.append(now[0]))) == 2**16
    assert max(after - before for before, after in itertools.pairwise([0.0, *moves])) < 20
    quick, now[0] = RangeReader({"Body": io.BytesIO(bytes(2**21))}, "key", 0, 2**21), 0.0
    monkeypatch.setattr(quick, "_body", Mock(read=Mock(side_effect=quick._body.read)))
    assert len(quick.read(2**21)) == 2**21
    assert [call.args[0] for call in quick._body.read.call_args_list[:6]] == [2**14, 2**15, 2**16, 2**17, 2**18, 2**18]


def test_an_upload_that_cannot_be_recorded_leaves_nothing(s3):
    objects, client, bucket = s3

    @contextmanager
    def recorded(key, upload_id):
        raise Transient("no primary")
        yield

    with pytest.raises(Transient, match="no primary"):
        objects.upload(io.BytesIO(b"x" * 12 * MIB), "unrecorded", recorded=recorded)
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert "unrecorded" not in [found["Key"] for found in left]
