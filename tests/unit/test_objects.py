"""What is told of answers that S3 would not give. No servers: each answer is what a test says."""

import io
from types import SimpleNamespace

import pytest
import urllib3
from botocore.awsrequest import AWSResponse

from engine.errors import Transient
from engine.model import Source
from engine.objects import Objects
from engine.s3 import connect
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
    """Objects, and a function that sets what each call is answered with."""
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    client = connect(Settings.model_validate(keys | {"aws_endpoint_url": "http://127.0.0.1:1"}))

    def answer(headers, body=b""):
        def send(request, **_):
            sent = io.BytesIO(b"" if request.method == "HEAD" else body)
            raw = urllib3.HTTPResponse(sent, headers, 200, preload_content=False, request_method=request.method)
            return AWSResponse(request.url, 200, raw.headers, raw)

        client.meta.events.register_first("before-send.s3", send)

    return SimpleNamespace(objects=Objects(client, "bucket"), answer=answer)


def listing(*entries, **told):
    """The body of a listing."""

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
        (b"<html><body>Welcome</body></html>", "is no listing: check the S3 server, and that AWS_ENDPOINT_URL"),
        (b"", "is no listing"),
        (listing(), "is no listing"),
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
