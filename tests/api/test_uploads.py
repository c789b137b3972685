"""Uploads as forms, on an API over real servers: stored whole under a key that the server makes, or not at all."""

import contextlib
import json
import os
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import falcon.testing
import httpx
import pytest

from api.problems import install
from api.uploads import FormUploads, reduced
from bench.rig import forget_peak, peak_mb
from engine.ports import free_port
from tests.api.conftest import answers, counted
from tests.api.hostile import hostile
from tests.running import Running, until

MIB = 1024 * 1024
BOUNDARY = b"x9f2c"


def form(data, name=b"file", filename=b'filename="a.ndjson"', end=b"--", part_kind=b"text/plain"):
    head = b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="' + name + b'"; ' + filename
    return head + b"\r\nContent-Type: " + part_kind + b"\r\n\r\n" + data + b"\r\n--" + BOUNDARY + end + b"\r\n"


def request(body, length=None, kind=b"multipart/form-data; boundary=" + BOUNDARY):
    size = str(len(body) if length is None else length).encode()
    return (
        b"POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: "
        + kind
        + b"\r\nContent-Length: "
        + size
        + b"\r\n\r\n"
        + body
    )


def stored(live):
    """Every key in the bucket, and every unfinished upload."""
    keys = {
        found["Key"]
        for page in live.s3.get_paginator("list_objects_v2").paginate(Bucket=live.bucket)
        for found in page.get("Contents", [])
    }
    return keys, live.s3.list_multipart_uploads(Bucket=live.bucket).get("Uploads", [])


def jobs(live):
    return live.store.jobs.count_documents({})


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 23 * MIB + 7])
def test_a_file_is_stored_whole_and_the_answer_tells_its_key_size_and_etag(live, size):
    data = random.Random(size).randbytes(size)
    answer = live.http.post("/upload", files={"file": ("some file.ndjson", data)})
    told = answer.json()
    assert answer.status_code == 201
    assert set(told) == {"message", "fileKey", "size", "etag"}
    assert told["message"] == "File uploaded successfully"
    assert told["size"] == size
    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}-some_file\.ndjson", told["fileKey"])
    found = live.s3.get_object(Bucket=live.bucket, Key=told["fileKey"])
    assert found["Body"].read() == data
    assert found["ETag"].strip('"') == told["etag"]


def test_keys_sort_by_the_time_of_their_making_and_are_never_the_same(live):
    keys = [live.http.post("/upload", files={"file": ("same.txt", b"x")}).json()["fileKey"] for _ in range(5)]
    assert len(set(keys)) == 5
    assert [key[:10] for key in keys] == sorted(key[:10] for key in keys)


HOSTILE = [
    "../../etc/passwd",
    "..\\..\\windows\\system.ini",
    "a/b/c.txt",
    "ü ñ €.txt",
    "",
    ".",
    "..",
    "-rf",
    "a" * 500 + ".ndjson",
    "x\x00y",
    'quote".txt',
    "new\nline",
    "%2e%2e%2f",
    "{$ne:1}",
    "<script>alert(1)</script>",
    "名前.json",
    "\u202egnp.exe",
    "." * 300,
    "данные.txt",
    "x." + "y" * 300,
    "con:aux|nul?*",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_reduced_to_letters_digits_dot_dash_and_underscore(name):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", reduced(name))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_ends_in_a_plain_key(live, raw, name):
    written = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "%0A").replace("\x00", "%00").encode()
    answer = raw(request(form(b"x", filename=b'filename="' + written + b'"')))
    status = int(answer.split(b" ", 2)[1])
    assert status in (201, 400)
    if status == 201:
        key = re.search(rb'"fileKey":"([^"]+)"', answer)[1].decode()
        assert re.fullmatch(r"[0-9A-Z]{26}-[A-Za-z0-9._-]+", key)


def test_five_hundred_hostile_strings_in_a_form_end_in_no_error_of_ours(live, raw):
    wrong = []
    for text in hostile(9):
        value = text.encode("utf-8", "surrogatepass")
        for sent in (
            form(b"x", filename=b'filename="' + value + b'"'),
            form(b"x", name=value),
            form(b"x", filename=b"filename*=" + value),
            value,
        ):
            answer = raw(request(sent))
            status = int(answer.split(b" ", 2)[1])
            if status not in (201, 400, 422) or (status != 201 and b"application/problem+json" not in answer):
                wrong.append((text, status))
        kind = re.sub(rb"[\x00-\x1f\x7f]", b"", value)
        status = int(raw(request(form(b"x"), kind=b"multipart/form-data; boundary=" + kind)).split(b" ", 2)[1])
        if status >= 500:
            wrong.append((text, status))
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "ends"),
    [("a" * 500 + ".ndjson", "aaa.ndjson"), ("名前.ndjson", "file.ndjson"), ("данные.txt", "file.txt")],
)
def test_the_extension_of_a_name_is_kept_since_it_tells_the_format(name, ends):
    assert reduced(name).endswith(ends)


def test_a_client_that_disconnects_leaves_nothing(live, raw):
    draw = random.Random(5)
    whole = request(form(draw.randbytes(600_000)))
    before, jobs_before = stored(live), jobs(live)
    cuts = [*sorted(draw.sample(range(1, len(whole) - 1), 99)), len(whole) - 1]
    for cut in cuts:
        assert raw(whole[:cut], leave=True) == b""
    assert live.http.get("/healthz").status_code == 200
    assert stored(live) == before
    assert jobs(live) == jobs_before


def test_a_form_that_was_cut_short_in_transit_is_refused_and_leaves_nothing(live, raw):
    draw = random.Random(6)
    # Clients of earlier tests may still hold slots.
    until(lambda: live.http.post("/upload", files={"file": ("a", b"x")}).status_code == 201, what="room for uploads")
    for size in (100, 12 * MIB):
        whole = form(draw.randbytes(size))
        before = stored(live)
        for cut in [len(whole) - 4, len(whole) - 8, len(whole) - 20, draw.randrange(1, len(whole) - 50)]:
            answer = raw(request(whole[:cut]))
            assert b" 400 " in answer.split(b"\r\n", 1)[0]
            assert b"application/problem+json" in answer
        assert stored(live) == before


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (form(b"x", name=b"other"), None, 422),
        (form(b"x", name=b""), None, 400),
        (form(b"x", name=b"\xff\xfe"), None, 400),
        (form(b"x", filename=b'filename="\xff\xfe"'), None, 400),
        (b"", None, 400),
        (b"no form at all", None, 400),
        (form(b"x", name=b"file\xff"), None, 400),
        (form(b"x"), b"multipart/form-data", 400),
        (form(b"x"), b"multipart/form-data; boundary=", 400),
        (form(b"x"), b"multipart/form-data; boundary=other", 400),
        (form(b"x"), b"multipart/form-data; boundary=" + b"b" * 300, 400),
        (form(b"x"), b"text/plain", 415),
        (b"{}", b"application/json", 415),
        (form(b"x")[: -len(BOUNDARY) - 6] + form(b"y"), None, 400),
        (b"--" + BOUNDARY + b"\r\n" + b"A: " + b"x" * 20_000 + b"\r\n\r\nx\r\n--" + BOUNDARY + b"--\r\n", None, 400),
        (form(b"x", part_kind=b"Multipart/Mixed; boundary=inner"), None, 400),  # as curl sends `file=@a,b`
        (b"--" + BOUNDARY + b"\r\nnonsense\r\n\r\nx\r\n--" + BOUNDARY + b"--\r\n", None, 400),
    ],
)
def test_a_malformed_form_is_answered_as_a_problem_and_leaves_nothing(live, raw, body, kind, status):
    before = stored(live)
    answer = raw(request(body) if kind is None else request(body, kind=kind))
    assert int(answer.split(b" ", 2)[1]) == status
    assert b"application/problem+json" in answer
    assert stored(live) == before


@pytest.mark.parametrize("first", [True, False])
def test_options_of_a_job_in_the_form_are_refused_and_leave_nothing(live, first):
    before = stored(live)
    parts = [("collection", (None, b"events")), ("file", ("a.ndjson", b"{}\n" * 3_000_000))]
    answer = live.http.post("/upload", files=parts if first else parts[::-1])
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:headrace:problem:invalid_request")
    assert "'collection'" in answer.json()["detail"]
    assert stored(live) == before


def test_a_form_without_a_body_has_no_file(live, raw):
    kind = b"Content-Type: multipart/form-data; boundary=x\r\n"
    answer = raw(b"POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + kind + b"\r\n")
    assert b" 400 " in answer.split(b"\r\n", 1)[0]
    assert b"missing_file" in answer
    assert b"missing_file" in raw(request(b""))


def test_what_is_wrong_beside_the_file_is_not_told_as_its_being_missing(raw):
    """A fault in the rest of the form must not be reported as `missing_file`."""
    nameless = b"\r\n--" + BOUNDARY + b"\r\nContent-Disposition: form-data\r\n\r\ny\r\n--" + BOUNDARY + b"--\r\n"
    answer = raw(request(form(b"x")[: -len(BOUNDARY) - 8] + nameless))
    assert b"malformed_form" in answer
    assert b"a part without a name" in answer
    answer = raw(request(form(b"x"), kind=b"multipart/form-data; q=0; boundary=" + BOUNDARY))
    assert b" 415 " in answer.split(b"\r\n", 1)[0]
    assert b"not_a_form" in answer


def test_a_part_whose_header_has_no_blank_after_its_colon_is_told_how_to_write_it(raw):
    """Falcon does not recognize it."""
    answer = raw(request(form(b"x").replace(b"Content-Disposition: ", b"Content-Disposition:")))
    assert b"missing_file" in answer
    assert b"mind the blanks" in answer


def test_a_name_that_is_not_utf_8_is_told_without_words_of_python(raw):
    answer = raw(request(form(b"x", filename=b'filename="\xff\xfe"')))
    assert b"Error" not in answer
    assert b"UTF-8" in answer


@pytest.mark.parametrize("path", [b"/upload", b"//upload", b"upload", b"///%75pload"])
def test_what_leads_to_the_upload_goes_through_its_door_and_is_counted(live, raw, path):
    """Every path that the application would route to the upload is checked as one, before its body is received."""
    before = counted(live, "POST", "/upload", 413)
    kind = b"Content-Type: multipart/form-data; boundary=x\r\n"
    answer = raw(b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + kind + b"Content-Length: 99999999999\r\n\r\n")
    assert b" 413 " in answer.split(b"\r\n", 1)[0]
    assert b"API_MAX_UPLOAD_BYTES" in answer
    until(lambda: counted(live, "POST", "/upload", 413) > before, what="its count")


def test_a_body_over_the_limit_is_refused_and_leaves_nothing(live):
    before = stored(live)
    answer = live.http.post("/upload", files={"file": ("large", b"x" * (41 * MIB))})
    assert answer.status_code == 413
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "API_MAX_UPLOAD_BYTES" in answer.json()["detail"]
    assert stored(live) == before


def test_the_largest_body_that_is_allowed_is_taken_and_one_byte_more_is_not(raw):
    body = form(b"x" * (40 * MIB - len(form(b""))))
    assert raw(request(body)).startswith(b"HTTP/1.1 201 ")
    assert raw(request(b"", len(body) + 1)).startswith(b"HTTP/1.1 413 ")


def test_the_api_stays_flat_while_a_large_file_goes_through(live, tmp_path):
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 300 * MIB)
    limits = {"port": (port := free_port()), "api_max_upload_bytes": "400MiB", "api_part_bytes": "5MiB"}
    api = Running("api", live.settings, tmp_path / "api.log", **limits)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http, large.open("rb") as file:
            until(lambda: answers(http), what="the API's first answer")
            assert http.post("/upload", files={"file": ("small", b"x")}).status_code == 201
            forget_peak(api.pid)
            before = peak_mb(api.pid)
            assert http.post("/upload", files={"file": ("large", file)}).json()["size"] == 300 * MIB
            assert peak_mb(api.pid) - before < 100
        assert api.stop() == 0
    finally:
        api.end()


def test_an_upload_under_way_ends_when_the_server_is_told_to_stop():
    stopping, read = threading.Event(), []

    class Bucket:
        def upload(self, content, key, complete, recorded):
            read.append(content.read(3))
            stopping.set()
            read.append(content.read(3))

    app = falcon.App()
    install(app)
    app.add_route("/upload", FormUploads(Bucket(), None, stopping))
    kind = {"Content-Type": "multipart/form-data; boundary=" + BOUNDARY.decode()}
    answer = falcon.testing.TestClient(app).simulate_post("/upload", body=form(b"123456"), headers=kind)
    assert (answer.status_code, answer.json["type"]) == (503, "urn:headrace:problem:stopping")
    assert read == [b"123"]


def test_a_client_that_leaves_before_the_answer_leaves_nothing_that_nobody_knows_of(live):
    draw = random.Random(8)
    before, earlier = stored(live), len(answered(live))
    whole = request(form(draw.randbytes(35 * MIB)))
    left = 0
    for turn in range(20):
        said = len(answered(live))
        with socket.create_connection(("127.0.0.1", live.port), timeout=30) as line:
            line.sendall(whole)
            time.sleep(0.05 + turn % 4 * 0.03)  # it is on its way to S3 now
        # If the client has gone before the application begins, there is no line in the log.
        with contextlib.suppress(pytest.fail.Exception):
            until(lambda said=said: len(answered(live)) > said, 3)
        left = answered(live)[earlier:].count(499)
        if left >= 3:
            break
    assert left >= 3
    # On a busy machine the last of them may still be on its way.
    until(lambda: stored(live)[1] == before[1], what="the end of all uploads")
    until(lambda: len(stored(live)[0] - before[0]) <= answered(live)[earlier:].count(201), what="a word of each upload")


def answered(live):
    """The statuses of all uploads so far, from the log."""
    told = [json.loads(line) for line in live.log().rpartition("\n")[0].splitlines()]
    return [line["status"] for line in told if line.get("path") == "/upload"]


def test_a_body_that_no_call_takes_is_refused_when_its_head_is_there(live):
    head = b"POST /process/x HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: early-1\r\nContent-Length: 1000000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as line:
        line.sendall(head)
        answer = line.recv(65536)
    assert b" 413 " in answer.split(b"\r\n", 1)[0]
    assert b"application/problem+json" in answer
    assert b"X-Request-Id: early-1" in answer or b"X-Request-ID: early-1" in answer


def test_a_client_that_asks_first_is_not_asked_for_a_body_that_is_refused(live):
    head = (
        b"POST /upload HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Content-Length: 99999999999\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as line:
        line.sendall(head)
        assert b" 413 " in line.recv(65536).split(b"\r\n", 1)[0]


def test_one_upload_too_many_is_refused_before_it_is_sent(live):
    kind = b"Content-Type: multipart/form-data; boundary=x\r\n"
    head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\n" + kind + b"Content-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=30)) for _ in range(5)]
        for line in lines:
            line.sendall(head)
            time.sleep(0.05)
        answer = lines[-1].recv(65536)
    assert b" 503 " in answer.split(b"\r\n", 1)[0]
    assert b"Retry-After" in answer
    until(lambda: live.http.post("/upload", files={"file": ("a", b"x")}).status_code == 201, what="room for the next")


def test_who_has_been_answered_may_send_the_next_at_once(live):
    """Four clients, as many as may upload at a time, each send one file after another: none is refused."""
    data = b"x" * (6 * MIB)

    def sent(http):
        while (answer := http.post("/upload", files={"file": ("a", data)})).status_code == 503:
            if "unavailable" not in answer.json()["type"]:  # that is for S3 to say
                break
        return answer.status_code

    def send(turns):
        with httpx.Client(base_url=live.http.base_url, timeout=60) as http:
            return [sent(http) for _ in range(turns)]

    with ThreadPoolExecutor(4) as pool:
        found = [code for codes in pool.map(send, [10] * 4) for code in codes]
    assert found == [201] * 40
