"""Answers that no proper S3 gives become errors that say what is wrong. No servers: the tests supply the answers."""

import contextlib
import io
from datetime import UTC, datetime
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import urllib3
from botocore.awsrequest import AWSResponse

from engine.errors import Transient
from engine.model import Source
from engine.s3.client import connect
from engine.s3.direct import DirectUploads, Upload
from engine.s3.objects import Objects
from engine.s3.parts import Parts
from engine.s3.replies import field
from engine.settings import Settings

WHOLE = {
    "ETag": '"e"',
    "Content-Length": "4",
    "Content-Range": "bytes 0-3/4",
    "Last-Modified": "Sun, 29 Nov 2026 17:17:59 GMT",
}

ENTRY = {"Key": "k", "Size": "4", "ETag": '"e"', "LastModified": "2026-11-29T17:17:59Z"}


@pytest.fixture
def s3():
    """A client and the objects of a bucket; `answer`, which sets the answer to all calls, or to those with `where` in
    their URL; and the URLs that were `asked` so far."""
    asked = []
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    client = connect(Settings.model_validate(keys | {"aws_endpoint_url": "http://127.0.0.1:1"}))

    def answer(headers, body=b"", where="", status=200):
        def send(request, **_):
            if where not in request.url:
                return None
            asked.append(request.url)
            sent = io.BytesIO(b"" if request.method == "HEAD" else body)
            raw = urllib3.HTTPResponse(sent, headers, status, preload_content=False, request_method=request.method)
            return AWSResponse(request.url, status, raw.headers, raw)

        client.meta.events.register_first("before-send.s3", send)

    return SimpleNamespace(client=client, objects=Objects(client, "bucket"), answer=answer, asked=asked)


@pytest.mark.parametrize("status", [301, 302, 307])
@pytest.mark.parametrize("call", ["check", "head", "time", "open", "ensure_bucket"])
def test_a_server_that_sends_elsewhere_is_asked_once_and_where_it_leads_is_told(s3, status, call):
    s3.answer({"Location": "https://s3.example/there"}, status=status)
    calls = {
        "check": s3.objects.check,
        "head": lambda: s3.objects.head("some/key"),
        "time": s3.objects.time,
        "open": lambda: s3.objects.open(Source("bucket", "some/key", '"e"', "", 4), 0, 4),
        "ensure_bucket": s3.objects.ensure_bucket,
    }
    with pytest.raises(Transient, match=r"elsewhere \(https://s3\.example/there\): set AWS_ENDPOINT_URL"):
        calls[call]()
    assert len(s3.asked) == 1


def listing(*entries, **told):
    """The body of a listing: its entries, and its other elements."""

    def tags(fields):
        return "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())

    contents = "".join(f"<Contents>{tags(entry)}</Contents>" for entry in entries)
    return f"<ListBucketResult>{tags(told)}{contents}</ListBucketResult>".encode()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ETag", None, r"answer for some/key lacks ETag: check the S3 server"),
        ("Content-Length", None, r"answer for some/key lacks Content-Length: check the S3 server"),
        ("Content-Length", "-5", r"answer for some/key has Content-Length -5: check the S3 server"),
        ("Last-Modified", "yesterday or so", r"answer for some/key cannot be read \(.*yesterday or so.*\): check"),
    ],
)
def test_of_an_object_whose_answer_is_not_whole_it_is_told_what_is_wrong(s3, name, value, told):
    s3.answer({key: given for key, given in (WHOLE | {name: value}).items() if given is not None}, b"data")
    with pytest.raises(Transient, match=told):
        s3.objects.head("some/key")
    with pytest.raises(Transient, match=told):
        s3.objects.open(Source("bucket", "some/key", '"e"', "", 4), 0, 4)


def test_an_answer_that_is_whole_is_taken(s3):
    s3.answer(WHOLE, b"data")
    source = s3.objects.head("some/key")
    assert source == Source("bucket", "some/key", '"e"', "", 4)
    with s3.objects.open(source, 0, 4) as reader:
        assert reader.read(4) == b"data"


@pytest.mark.parametrize("missing", ["Key", "Size", "ETag", "LastModified"])
def test_of_an_entry_that_is_not_whole_it_is_told_what_it_lacks(s3, missing):
    s3.answer({}, listing({name: value for name, value in ENTRY.items() if name != missing}, Name="bucket"))
    with pytest.raises(Transient, match=f"the listing of bucket bucket lacks {missing}"):
        s3.objects.page()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html><body>Welcome</body></html>", "is not a listing: check the S3 server, and that AWS_ENDPOINT_URL"),
        (b"", "is not a listing"),
        (listing(), "is not a listing"),
        (listing(ENTRY | {"LastModified": "yesterday or so"}), "cannot be read .*yesterday or so"),
        (listing(ENTRY | {"Size": "four"}), "cannot be read .*four"),
        (listing(ENTRY, IsTruncated="true"), "the listing of bucket bucket lacks NextContinuationToken"),
    ],
)
def test_what_is_no_whole_listing_is_not_taken_for_one(s3, body, told):
    s3.answer({}, body)
    with pytest.raises(Transient, match=told):
        s3.objects.page()


def test_a_listing_without_anything_is_of_an_empty_bucket(s3):
    s3.answer({}, listing(Name="bucket", IsTruncated="false"))
    assert s3.objects.page() == ([], None)


@pytest.mark.parametrize(
    ("headers", "told"), [({}, "lacks date"), ({"Date": "yesterday or so"}, "cannot be read .*yesterday or so")]
)
def test_a_clock_that_cannot_be_read_is_told(s3, headers, told):
    s3.answer(headers)
    with pytest.raises(Transient, match=f"answer for its time {told}"):
        s3.objects.time()


BEGUN = b"<R><UploadId>u</UploadId></R>"
UPLOAD = Upload("n", "u", "some/key", 5, 4, datetime(2026, 11, 29, tzinfo=UTC))


def send(s3):
    """Upload two parts of one byte each."""
    parts = Parts(s3.client, "bucket", 1, 2, s3.objects.head)
    parts.store(io.BytesIO(b"ab"), "some/key", lambda: None, lambda key, upload: contextlib.nullcontext())


def direct(s3):
    """Direct uploads, one of which is in progress."""
    store = MagicMock()
    upload = {"_id": "n", "key": "some/key", "uploadId": "u", "size": 4, "partBytes": 5, "createdAt": None}
    store.uploads.find_one.return_value = upload
    return DirectUploads(store, s3.client, s3.objects, 5 * 2**20)


@pytest.mark.parametrize(("body", "told"), [(b"<R/>", "answer for some/key lacks UploadId"), (b"<html>", r"\(500\)")])
def test_an_upload_that_s3_does_not_name_has_not_begun(s3, body, told):
    s3.answer({}, body)
    with pytest.raises(Transient, match=f"{told}: check the S3 server"):
        send(s3)
    with pytest.raises(Transient, match=f"{told}: check the S3 server"):
        direct(s3).begin("n", "some/key", None, None)


def test_a_part_without_a_digest_is_told_by_its_number_and_the_upload_is_aborted(s3):
    asked = []
    s3.client.meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    s3.answer({}, BEGUN)
    s3.answer({}, b"", "partNumber=")
    with pytest.raises(Transient, match="answer for part 1 of some/key lacks ETag: check"):
        send(s3)
    assert asked[-1] == "AbortMultipartUpload"


@pytest.mark.parametrize("missing", ["PartNumber", "Size", "ETag", "LastModified"])
def test_of_a_part_that_is_not_whole_it_is_told_what_it_lacks(s3, missing):
    whole = {"PartNumber": "1", "Size": "4", "ETag": '"e"', "LastModified": "2026-11-29T17:17:59Z"}
    fields = "".join(f"<{name}>{value}</{name}>" for name, value in whole.items() if name != missing)
    s3.answer({}, f"<R><Part>{fields}</Part></R>".encode())
    with pytest.raises(Transient, match=f"answer for the parts of some/key lacks {missing}: check"):
        direct(s3).parts(UPLOAD)


@pytest.mark.parametrize("value", [None, "", -1])
def test_a_field_that_is_missing_empty_or_negative_is_told(value):
    with pytest.raises(Transient, match="check the S3 server"):
        field({"UploadId": value}, "UploadId", "some/key")
    assert field({"ContentLength": 0}, "ContentLength", "some/key") == 0


def test_parts_whose_times_cannot_be_read_are_told(s3):
    s3.answer({}, b"<R><Part><PartNumber>1</PartNumber><LastModified>yesterday or so</LastModified></Part></R>")
    with pytest.raises(Transient, match=r"answer for the parts of some/key cannot be read .*yesterday or so"):
        direct(s3).parts(UPLOAD)
