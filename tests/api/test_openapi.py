"""What the API says of itself is what it does: schemathesis runs over it, and hostile strings end in no error of ours."""

import random
import re
import string
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.openapi import from_dict


@pytest.fixture(autouse=True)
def tidy(live):
    """What these tests submit must not hold up the others."""
    yield
    for job in live.store.jobs.find({"open": True}, {"_id": 1}):
        live.http.post(f"/jobs/{job['_id']}/cancel")


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


# Streams that wait have tests of their own; a paused queue would hold up the other tests.
LEFT_OUT = re.compile(r"/(events|pause)$")


@pytest.mark.timeout(400)
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
            # Any key may be answered with 404; and an invalid header is refused by the server, before the application.
            excluded = [checks.positive_data_acceptance, checks.unsupported_method, checks.ignored_auth]
            case.call_and_validate(base_url=str(live.http.base_url), excluded_checks=excluded)

        try:
            call()
        except Exception as error:  # noqa: BLE001 (all calls are tried before one is told)
            wrong.append(f"{operation.label}: {error}"[:1500])
    assert len(seen) >= 25
    assert wrong == []


HOSTILE = [
    "",
    " ",
    "\x00",
    "../../etc/passwd",
    "..\\..\\windows",
    "{$ne: null}",
    '{"$gt": ""}',
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>",
    "%00",
    "%2e%2e%2f",
    "%c0%ae",
    "\ufeff",
    "\u202e",
    "\U0001f600" * 50,
    "A" * 4000,
    "-1",
    "1e999",
    "NaN",
    "true",
    "null",
    "[]",
    "{}",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "\r\nX-Injected: 1",
    "$where",
    "__proto__",
    "0x41",
    "9" * 400,
]


def hostile(seed):
    """Five hundred strings: the known ones, and seeded draws from what breaks parsers."""
    draw = random.Random(seed)
    letters = string.printable + "\x00\x7f\x80ÿßあ\u2028\ud7ff\ufffe" + "%{}$[]\"'\\" * 5
    return HOSTILE + ["".join(draw.choices(letters, k=draw.randrange(1, 60))) for _ in range(500 - len(HOSTILE))]


PLACES = [
    lambda text: ("GET", "/status/{0}", None, None),
    lambda text: ("GET", "/jobs/{0}", None, None),
    lambda text: ("GET", "/jobs/{0}/events", None, None),
    lambda text: ("GET", "/jobs/{0}/rejects", None, None),
    lambda text: ("POST", "/jobs/{0}/cancel", None, None),
    lambda text: ("POST", "/jobs/{0}/retry", None, None),
    lambda text: ("GET", "/batches/{0}", None, None),
    lambda text: ("GET", "/uploads/{0}", None, None),
    lambda text: ("POST", "/uploads/{0}/complete", None, None),
    lambda text: ("DELETE", "/uploads/{0}", None, None),
    lambda text: ("GET", "/files/{0}", None, None),
    lambda text: ("DELETE", "/files/{0}", None, None),
    lambda text: ("GET", "/docs/{0}", None, None),
    lambda text: ("GET", "/{0}", None, None),
    lambda text: ("POST", "/process/{0}", None, {}),
    *(
        (lambda text, name=name: ("GET", "/jobs", {name: text}, None))
        for name in ("status", "file", "collection", "limit", "cursor", "batch")
    ),
    *((lambda text, name=name: ("GET", "/files", {name: text}, None)) for name in ("prefix", "limit", "cursor")),
    *(
        (lambda text, name=name: ("POST", "/process/HOSTILE", None, {name: text}))
        for name in (
            "collection", "format", "maxErrors", "priority", "force", "ifLoaded", "validate", "runAt", "timeoutSeconds"
        )
    ),
    lambda text: ("POST", "/process", None, {"prefix": text}),
    lambda text: ("POST", "/process", None, {"fileKeys": [text]}),
    lambda text: ("POST", "/process", None, {text: 1}),
    lambda text: ("POST", "/uploads", None, {"fileName": text, "size": 1}),
    lambda text: ("POST", "/uploads", None, {"fileName": "a", "size": text}),
]  # fmt: skip


@pytest.mark.timeout(300)
def test_five_hundred_hostile_strings_in_every_place_end_in_no_error_of_ours(live):
    live.s3.put_object(Bucket=live.bucket, Key="HOSTILE", Body=b"{}\n")
    wrong = []
    made = []
    with httpx.Client(base_url=live.http.base_url, timeout=60) as http:
        for number, text in enumerate(hostile(7)):
            # Each string goes to every third place, so that every place sees over a hundred and all of the known ones.
            for place in PLACES if number < len(HOSTILE) else PLACES[number % 3 :: 3]:
                method, path, query, body = place(text)
                path = path.format(quote(text.encode("utf-8", "surrogatepass"), safe=""))
                answer = http.request(method, path, params=query, json=body)
                if answer.status_code >= 500 or "Traceback" in answer.text:
                    wrong.append((method, path[:80], str(query or body)[:120], answer.status_code, answer.text[:200]))
                if answer.status_code == 201:
                    made.append(answer.json()["uploadId"])
                if answer.status_code >= 400 and path != "/":
                    assert answer.headers["Content-Type"] == "application/problem+json"
                    assert answer.json()["requestId"] == answer.headers["X-Request-ID"]
        headers = [
            b"Idempotency-Key",
            b"Prefer",
            b"If-None-Match",
            b"X-Request-ID",
            b"Authorization",
            b"Accept",
            b"Content-Type",
        ]
        for number, text in enumerate(hostile(8)):
            name = headers[number % len(headers)]
            value = re.sub(rb"[\x00-\x1f\x7f]", b"", text.encode("utf-8", "surrogatepass")).strip()[:2000]
            answer = http.post("/process/HOSTILE", headers=[(name, value)], content=b"{}")
            if answer.status_code >= 500:
                wrong.append((name, value, answer.status_code, answer.text[:200]))
        for upload in made:
            http.delete(f"/uploads/{upload}")
    assert wrong == []
