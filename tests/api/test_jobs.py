"""Jobs over HTTP, on real servers: any object can be processed, errors name their cause, and the numbers are exact."""

import io
import re
from urllib.parse import quote

import orjson
import pytest

from engine.control.store import job_key
from tests.api.conftest import answers, slow_inserts
from tests.running import until


def put(live, data, key):
    return live.objects.upload(io.BytesIO(data), key)


def process(live, key, **body):
    return live.http.post(f"/process/{quote(key, safe='/')}", json=body)


def test_the_main_job(live, finish):
    lines = [orjson.dumps({"n": n, "text": "x" * 50}) for n in range(5000)]
    lines[17] = b"{bad"
    key = live.http.post("/upload", files={"file": ("main.ndjson", b"\n".join(lines))}).json()["fileKey"]
    answer = process(live, key, collection="main")
    assert answer.status_code == 202
    told = answer.json()
    assert set(told) == {"message", "jobId", "status"}
    assert (told["message"], told["status"]) == ("Job created successfully", "PENDING")
    assert answer.headers["Location"] == f"/status/{told['jobId']}"
    status = finish(told["jobId"])
    progress = status["progress"]
    assert (status["status"], status["fileKey"], status["error"]) == ("COMPLETED", key, None)
    assert (status["database"], status["collection"]) == (live.data.name, "main")
    assert set(progress) == {
        "bytesTotal",
        "bytesDone",
        "rangesTotal",
        "rangesDone",
        "lines",
        "inserted",
        "duplicates",
        "rejected",
        "blank",
        "percent",
        "recordsPerSecond",
        "secondsLeft",
    }
    assert progress["bytesTotal"] == progress["bytesDone"] == len(b"\n".join(lines))
    assert (progress["lines"], progress["inserted"], progress["rejected"], progress["percent"]) == (5000, 4999, 1, 100)
    assert progress["rangesDone"] == progress["rangesTotal"] >= 1
    [reject] = status["errors"]
    assert (reject["line"], reject["reason"], reject["raw"]) == (18, "invalid_json", "{bad")
    times = [status[name] for name in ("createdAt", "startedAt", "finishedAt")]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at) for at in times)
    assert times == sorted(times)
    assert live.data["main"].count_documents({}) == 4999


@pytest.mark.parametrize(
    "key",
    [
        "plain.ndjson",
        "with/slashes/and more.ndjson",
        "/leading.ndjson",
        "double//slash.ndjson",
        "trailing.ndjson/x",
        "per%2Fcent%20.ndjson",
        "question?mark#hash.ndjson",
        "ünïcode ☃.ndjson",
        "plus+and&amp;.ndjson",
        "status/jobs.ndjson",
        "a=b;c:d@e,f'g(h).ndjson",
    ],
)
def test_any_object_can_be_processed_whatever_its_key(live, finish, key):
    try:
        put(live, b'{"a":1}\n', key)
        live.objects.head(key)
    except Exception as error:  # noqa: BLE001
        pytest.fail(f"the S3 server does not keep this key: {error}")
    answer = process(live, key, collection="keys")
    assert answer.status_code == 202, answer.text
    status = finish(answer.json()["jobId"])
    assert (status["status"], status["fileKey"]) == ("COMPLETED", key)


@pytest.mark.parametrize("key", ["nowhere", "no/where", "", "/", "a/../b", "x" * 1025, "nul%00", "%ff"])
def test_an_object_that_does_not_exist_is_not_found(live, key):
    answer = live.http.post(f"/process/{key}")
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"colection": "x"}, "colection"),
        ({"collection": 5}, "collection"),
        ({"collection": {"$ne": 1}}, "collection"),
        ({"collection": ""}, "collection"),
        ({"format": "csv"}, "format"),
        ({"maxErrors": -1}, "maxErrors"),
        ({"maxErrors": 1.5}, "maxErrors"),
        ({"maxErrors": "lots"}, "maxErrors"),
        ({"maxErrors": "101%"}, "maxErrors"),
        ({"maxErrors": ".5%"}, "maxErrors"),
        ({"maxErrors": "5.%"}, "maxErrors"),
        ({"maxErrors": "0.1234567%"}, "maxErrors"),
        ({"maxErrors": True}, "maxErrors"),
        ({"maxErrors": None}, "maxErrors"),
        ({"priority": "high"}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 2**70}, "priority"),
        ({"force": 1}, "force"),
        ({"force": "true"}, "force"),
        ({"ifLoaded": "maybe"}, "ifLoaded"),
        ({"max_errors": 3}, "max_errors"),
    ],
)
def test_an_unknown_field_or_a_wrong_type_is_named(live, body, field):
    put(live, b"{}\n", "body.ndjson")
    answer = process(live, "body.ndjson", **body)
    assert answer.status_code == 422
    assert field in [fault["field"] for fault in answer.json()["errors"]]
    assert field in answer.json()["detail"]


def test_what_is_not_known_is_told_what_is(live):
    put(live, b"{}\n", "body.ndjson")
    told = process(live, "body.ndjson", colection="x").json()["detail"]
    assert "collection, format, maxErrors, priority" in told
    told = live.http.get("/jobs", params={"x": 1}).json()["detail"]
    assert "status, file, collection, batch, limit, cursor" in told
    answer = live.http.request("FOO", "/jobs")
    assert (answer.status_code, "use GET" in answer.json()["detail"]) == (400, True)


def test_a_body_that_is_compressed_is_refused_with_a_sentence(live):
    for path in ("/process/body.ndjson", "/upload"):
        headers = {"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=x"}
        answer = live.http.post(path, content=b"\x1f\x8b", headers=headers)
        assert (answer.status_code, "without that header" in answer.json()["detail"]) == (415, True)


def test_a_byte_of_a_path_that_is_no_ascii_is_to_be_percent_encoded(raw):
    answer = raw("GET /files/ü HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert b" 400 " in answer.split(b"\r\n", 1)[0]
    assert b"percent-encode" in answer


def test_head_is_answered_as_get_without_a_body(live, finish):
    put(live, b"{}\n", "body.ndjson")
    job_id = process(live, "body.ndjson", collection="head").json()["jobId"]
    finish(job_id)

    def both(path):
        asked, told = live.http.head(path), live.http.get(path)
        return asked.headers["Content-Length"] == told.headers["Content-Length"] and (asked, told)

    for path in ("/jobs", f"/jobs/{job_id}", f"/status/{job_id}", "/files", "/files/body.ndjson", "/healthz", "/docs"):
        # Again, since a job of another test may go on between the two.
        asked, told = until(lambda path=path: both(path), 10, f"the same length of {path}")
        assert (asked.status_code, asked.content) == (200, b"")
        assert asked.headers["Content-Type"] == told.headers["Content-Type"]
    assert live.http.head("/jobs/nothing").status_code == 404
    for path in ("events", "rejects?format=ndjson"):
        assert live.http.head(f"/jobs/{job_id}/{path}").status_code == 405


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 422), (b"5", 422), (b'"x"', 422), (b"null", 422), (b"\xff", 400), (b"x" * 1_100_000, 413)],
)
def test_a_body_that_is_no_object_is_refused(live, body, status):
    put(live, b"{}\n", "body.ndjson")
    answer = live.http.post("/process/body.ndjson", content=body)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("name", ["system.users", "a$b", ".x", "x.", "nul\0"])
def test_a_collection_that_cannot_take_documents_is_refused(live, name):
    put(live, b"{}\n", "body.ndjson")
    answer = process(live, "body.ndjson", collection=name)
    assert answer.status_code == 422
    assert "collection" in answer.json()["detail"]


def test_a_name_of_a_collection_may_be_long(live):
    put(live, b"{}\n", "body.ndjson")
    assert process(live, "body.ndjson", collection="x" * 200).status_code == 202


def test_a_view_a_capped_and_a_time_series_collection_are_refused(live):
    put(live, b"{}\n", "body.ndjson")
    live.data.create_collection("capped", capped=True, size=4096)
    live.data.create_collection("view", viewOn="records", pipeline=[])
    live.data.create_collection("series", timeseries={"timeField": "t"})
    for name in ("capped", "view", "series"):
        assert process(live, "body.ndjson", collection=name).status_code == 422


@pytest.mark.parametrize("job", ["x", "6b04", "0" * 24, "G" * 24, "0" * 25, "%24ne"])
def test_an_unknown_or_malformed_job_is_not_found(live, job):
    for method, path in (
        ("GET", f"/status/{job}"),
        ("GET", f"/jobs/{job}/rejects"),
        ("POST", f"/jobs/{job}/cancel"),
        ("POST", f"/jobs/{job}/retry"),
    ):
        answer = live.http.request(method, path)
        assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")


def test_of_a_job_of_a_later_version_it_is_told_that_it_is_one(live, finish):
    put(live, b"{}\n", "later.ndjson")
    job = finish(process(live, "later.ndjson").json()["jobId"])["jobId"]
    live.store.jobs.update_one({"_id": job_key(job)}, {"$set": {"options.format": "parquet"}})
    for path in (f"/status/{job}", f"/jobs/{job}", f"/jobs/{job}/rejects", f"/jobs/{job}/events"):
        answer = live.http.get(path)
        assert answer.status_code == 409
        assert "later version" in answer.json()["detail"]


def test_rejects_are_complete_paged_and_downloadable(live, finish):
    data = b"".join(b'{"n":1}\nbad %d\n' % n for n in range(250))
    put(live, data, "rejects.ndjson")
    job = process(live, "rejects.ndjson", collection="rejects", maxErrors="60%").json()["jobId"]
    assert finish(job)["status"] == "COMPLETED"
    found, cursor = [], None
    while True:
        page = live.http.get(f"/jobs/{job}/rejects", params={"limit": 60} | ({"cursor": cursor} if cursor else {}))
        found += page.json()["rejects"]
        if (cursor := page.json()["next"]) is None:
            break
    assert [reject["line"] for reject in found] == list(range(2, 501, 2))
    assert all(data[r["offset"] : r["offset"] + r["length"]].decode() == r["raw"] for r in found)
    download = live.http.get(f"/jobs/{job}/rejects?format=ndjson")
    assert download.content == b"".join(b"bad %d\n" % n for n in range(250))
    assert "attachment" in download.headers["Content-Disposition"]
    assert f"{job}-rejects.ndjson" in download.headers["Content-Disposition"]
    plain = live.http.get(f"/jobs/{job}/rejects", headers={"Accept": "application/x-ndjson"})
    assert (plain.content, plain.headers["Content-Type"]) == (download.content, download.headers["Content-Type"])


def test_rejects_of_a_text_are_downloaded_as_one_so_that_they_are_loaded_as_one(live, finish):
    """As .ndjson, each of its lines would have to be JSON."""
    put(live, b"fine\n\xff\xfe\n", "rejects.txt")
    job = process(live, "rejects.txt", collection="texts", maxErrors="60%").json()["jobId"]
    assert finish(job)["progress"]["rejected"] == 1
    download = live.http.get(f"/jobs/{job}/rejects?format=ndjson")
    assert download.content == b"\xff\xfe\n"
    assert f"{job}-rejects.txt" in download.headers["Content-Disposition"]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=100000", "cursor=%21%21", "format=xml", "format=ndjson&limit=1"]
)
def test_a_wrong_question_for_rejects_is_refused(live, query):
    put(live, b"{}\n", "body.ndjson")
    job = process(live, "body.ndjson").json()["jobId"]
    assert live.http.get(f"/jobs/{job}/rejects?{query}").status_code == 422


def test_cancel_and_retry_are_safe_to_repeat(live, finish):
    data = b"".join(b'{"n":%d,"t":"%s"}\n' % (n, b"x" * 200) for n in range(100_000))
    put(live, data, "long.ndjson")
    with slow_inserts(live, 1000):  # it must not end before it is cancelled
        job = process(live, "long.ndjson", collection="long").json()["jobId"]
        assert [live.http.post(f"/jobs/{job}/cancel").status_code for _ in range(3)] == [202] * 3
        assert finish(job)["status"] == "CANCELLED"
    assert live.http.post(f"/jobs/{job}/cancel").json()["status"] == "CANCELLED"
    with slow_inserts(live, 1000):
        assert [live.http.post(f"/jobs/{job}/retry").status_code for _ in range(2)] == [202] * 2
    status = finish(job)
    assert (status["status"], status["progress"]["inserted"]) == ("COMPLETED", 100_000)
    assert live.data["long"].count_documents({}) == 100_000
    for what in ("cancel", "retry"):
        assert live.http.post(f"/jobs/{job}/{what}").status_code == 409


def test_the_numbers_move_while_it_runs(live):
    data = b"".join(b'{"n":%d,"t":"%s"}\n' % (n, b"x" * 200) for n in range(60_000))
    put(live, data, "moving.ndjson")
    with slow_inserts(live, 700):  # 13 ranges, two at a time: over four seconds, with numbers each second
        job = process(live, "moving.ndjson", collection="moving").json()["jobId"]
        seen, told = [], {"status": "PENDING"}
        while told["status"] in ("PENDING", "PROCESSING"):
            told = live.http.get(f"/status/{job}").json()
            seen.append(told["progress"]["lines"])
    assert told["status"] == "COMPLETED"
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_health_ready_and_what_is_not_there(live):
    assert live.http.get("/healthz").json() == {"status": "ok"}
    until(lambda: answers(live.http), what="MongoDB and S3")
    assert live.http.get("/readyz").json() == {"status": "ready", "mongodb": "ok", "s3": "ok"}
    for path, status in (("/nowhere", 404), ("/", 404), ("/upload", 405), ("/process/x", 405)):
        answer = live.http.get(path)
        assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
        assert set(answer.json()) >= {"type", "title", "status", "detail", "requestId"}
        assert answer.headers["X-Request-ID"] == answer.json()["requestId"]


def test_the_request_id_of_the_client_is_kept_where_it_is_plain(live):
    assert live.http.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    assert live.http.get("/healthz", headers={"X-Request-ID": "a b\tc"}).headers["X-Request-ID"] != "a b\tc"


@pytest.mark.parametrize("key", ["%ff.ndjson", "%ed%a0%80.ndjson", "a/%fe"])
def test_a_path_that_is_no_utf8_names_no_other_object(live, key):
    put(live, b"{}\n", "\ufffd.ndjson")
    for method, path in (("DELETE", "/files/"), ("GET", "/files/"), ("POST", "/process/")):
        answer = live.http.request(method, path + key)
        assert (answer.status_code, "UTF-8" in answer.json()["detail"]) == (404, True)
    assert live.http.get("/files/%EF%BF%BD.ndjson").status_code == 200
