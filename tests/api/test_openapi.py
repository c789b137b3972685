"""An API over real servers does what its description says, by schemathesis; hostile strings cause no server error."""

import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.openapi import from_dict

from tests.api.conftest import Patient
from tests.api.hostile import hostile
from tests.running import until


@pytest.fixture(autouse=True)
def tidy(live):
    """Cancel and delete what these tests submit: it would hold up other tests."""
    yield
    for job in live.store.jobs.find({"open": True}, {"_id": 1}):
        live.http.post(f"/jobs/{job['_id']}/cancel")
    for upload in live.store.uploads.find({}, {"_id": 1}):
        live.http.delete(f"/uploads/{quote(upload['_id'], safe='')}")


@pytest.fixture(scope="module")
def described(live):
    return live.http.get("/openapi.json").json()


def test_the_description_is_openapi_3_1_with_every_call(described):
    assert described["openapi"].startswith("3.1")
    wanted = {
        "/upload",
        "/process/{fileKey}",
        "/process",
        "/status/{jobId}",
        "/jobs",
        "/jobs/{jobId}",
        "/healthz",
        "/metrics",
    }
    assert wanted <= set(described["paths"])
    ids = [call["operationId"] for methods in described["paths"].values() for call in methods.values()]
    assert len(ids) == len(set(ids))


def test_headers_states_times_and_fields_are_described(described):
    answers = [
        (status, answer, f"{method} {path}")
        for path, methods in described["paths"].items()
        for method, call in methods.items()
        for status, answer in call["responses"].items()
    ]
    asked = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After", "304": "ETag"}
    for status, answer, where in answers:
        assert "X-Request-ID" in answer["headers"], where
        assert asked.get(status, "X-Request-ID") in answer["headers"], where
    assert "Location" in described["paths"]["/uploads"]["post"]["responses"]["201"]["headers"]
    schemas = described["components"]["schemas"]
    assert "COMPLETED" in schemas["JobStatus"]["properties"]["status"]["enum"]
    assert {"type": "string", "format": "date-time"} in schemas["JobStatus"]["properties"]["runAt"]["anyOf"]
    for name in ("JobStatus", "ProgressBody", "RejectBody", "DirectUpload", "WorkerBody", "ProblemBody"):
        assert all("description" in field for field in schemas[name]["properties"].values()), name


def test_the_page_needs_no_internet(live):
    page = live.http.get("/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert linked
    for place in linked:
        assert place.startswith("/docs/")
        assert live.http.get(place).status_code == 200
    assert live.http.get("/docs/nothing").status_code == 404


# Event streams have tests of their own; a paused queue would hold up the other tests.
LEFT_OUT = re.compile(r"/(events|pause)$")


@pytest.mark.timeout(1200)
def test_what_is_described_is_what_is_answered(live, described):
    seen, wrong = [], []
    for found in from_dict(described).get_all_operations():
        operation = found.ok()
        if LEFT_OUT.search(operation.path):
            continue
        seen.append(operation.label)

        @given(operation.as_strategy())
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def call(case):
            case.headers.pop("Prefer", None)
            # A valid key may be answered with 404, and a header that the server refuses never reaches the application.
            excluded = [checks.positive_data_acceptance, checks.ignored_auth]
            where = {"base_url": str(live.http.base_url), "timeout": 60}
            answer = until(lambda: (now := case.call(**where)).status_code != 503 and now, what="an answer")
            case.validate_response(answer, excluded_checks=excluded)

        try:
            call()
        except Exception as error:  # noqa: BLE001 (all calls are tried before any error is reported)
            wrong.append(f"{operation.label}: {error}"[:1500])
    assert len(seen) >= 25
    assert wrong == []


# Fields that take any text are sent alone, so that each is used; errors of all typed fields come in one answer.
TYPED = ("format", "maxErrors", "priority", "force", "ifLoaded", "validate", "runAt", "timeoutSeconds")

PLACES = [
    *(
        (lambda text, place=place: (*place, None, None))
        for place in (
            ("GET", "/{0}"),
            ("GET", "/status/{0}"),
            ("GET", "/jobs/{0}"),
            ("GET", "/jobs/{0}/events"),
            ("GET", "/jobs/{0}/rejects"),
            ("POST", "/jobs/{0}/cancel"),
            ("POST", "/jobs/{0}/retry"),
            ("GET", "/batches/{0}"),
            ("GET", "/uploads/{0}"),
            ("POST", "/uploads/{0}/complete"),
            ("DELETE", "/uploads/{0}"),
            ("GET", "/files/{0}"),
            ("DELETE", "/files/{0}"),
            ("GET", "/docs/{0}"),
        )
    ),
    lambda text: ("POST", "/process/{0}", None, {}),
    *((lambda text, name=name: ("GET", "/jobs", {name: text}, None)) for name in ("file", "collection", "cursor")),
    lambda text: ("GET", "/jobs", {"status": text, "limit": text, "batch": text}, None),
    *((lambda text, name=name: ("GET", "/files", {name: text}, None)) for name in ("prefix", "limit", "cursor")),
    lambda text: ("GET", "/jobs/6b04fa6b779ece9e9d7d9cbc/rejects", {"format": text, "limit": text}, None),
    lambda text: ("GET", "/jobs/6b04fa6b779ece9e9d7d9cbc/rejects", {"cursor": text}, None),
    lambda text: ("GET", "/uploads/none", {"first": text, "count": text}, None),
    lambda text: ("POST", "/process/HOSTILE", None, {"collection": text}),
    lambda text: ("POST", "/process/HOSTILE", None, dict.fromkeys(TYPED, text)),
    lambda text: ("POST", "/process", None, {"prefix": text}),
    lambda text: ("POST", "/process", None, {"fileKeys": [text]}),
    lambda text: ("POST", "/process", None, {text: 1}),
    lambda text: ("POST", "/uploads", None, {"fileName": text, "size": 1}),
    lambda text: ("POST", "/uploads", None, {"fileName": "a", "size": text, "partBytes": text}),
]

HEADERS = [b"Idempotency-Key", b"Prefer", b"If-None-Match", b"X-Request-ID", b"Authorization", b"Accept", b"Origin"]


def ask(http, method, path, given):
    """Send a request; returns what is wrong with its answer, or None."""
    answer = http.request(method, path, **given)
    told = (method, path[:80], str(given)[:200], answer.status_code, answer.text[:200])
    if answer.status_code >= 500 or "Traceback" in answer.text:
        return told
    if answer.status_code >= 400 and path != "/":
        problem = answer.headers["Content-Type"] == "application/problem+json"
        if not problem or answer.json()["requestId"] != answer.headers["X-Request-ID"]:
            return told
    return None


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(2))
def test_five_hundred_hostile_strings_in_every_place_end_in_no_error_of_ours(live, part):
    live.s3.put_object(Bucket=live.bucket, Key="HOSTILE", Body=b"{}\n")
    asks = []
    for text in hostile(7)[part::2]:
        for place in PLACES:
            method, path, query, body = place(text)
            path = path.format(quote(text.encode("utf-8", "surrogatepass"), safe=""))
            asks.append((method, path, {"params": query, "json": body}))
        value = re.sub(rb"[\x00-\x1f\x7f]", b"", text.encode("utf-8", "surrogatepass")).strip()[:2000]
        for names in (HEADERS, [b"Content-Type"]):
            given = {"headers": [(name, value) for name in names], "content": b"{}"}
            asks.append(("POST", "/process/HOSTILE", given))

    def lane(number):
        # A client for each thread: the server closes the connection after some of these requests, when another thread
        # that shared it might be about to use it.
        with Patient(base_url=live.http.base_url, timeout=60) as http:
            return [ask(http, *one) for one in asks[number::4]]

    with ThreadPoolExecutor(4) as pool:
        told = [one for some in pool.map(lane, range(4)) for one in some]
    assert len(told) == 250 * (len(PLACES) + 2)
    assert list(filter(None, told)) == []
