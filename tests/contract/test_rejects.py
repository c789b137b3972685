"""What is true of rejects on a real MongoDB and on mongomock's model of one."""

from datetime import UTC, datetime
from types import SimpleNamespace

import mongomock
import pytest
from bson import ObjectId

from engine.model import Job, JobOptions, JobState, Reason, Reject, Source
from engine.rejects import Rejects


@pytest.fixture(params=["mongod", "mongomock"])
def rejects(request):
    ledger = SimpleNamespace(first_lines=lambda job_id: {0: 0, 1: 500})
    if request.param == "mongod":
        return Rejects(request.getfixturevalue("store"), ledger)
    return Rejects(SimpleNamespace(rejects=mongomock.MongoClient().db.rejects), ledger)


@pytest.fixture
def job():
    source = Source("bucket", "some/key", '"tag"', "", 1000)
    return Job(str(ObjectId()), source, JobOptions(), JobState.PROCESSING, datetime.now(UTC))


def made(offset, ordinal=0, head=b"bad", length=None, reason=Reason.INVALID_JSON):
    return Reject(offset, len(head) if length is None else length, ordinal, reason, "why", head)


def test_rejects_are_paged_in_the_order_of_the_file_each_once(rejects, job):
    offsets = [5, 2**40, 0, 300, 2**31 + 1]
    rejects.write(job, 0, [made(offset) for offset in offsets])
    rejects.write(job, 0, [made(5), made(7)])  # a replay writes some of them again
    found, after = [], None
    while page := rejects.page(job.id, 2, after):
        found += page
        after = page[-1]["offset"]
    assert [reject["offset"] for reject in found] == sorted({*offsets, 7})


def test_another_jobs_rejects_are_not_shown(rejects, job):
    rejects.write(job, 0, [made(1)])
    assert rejects.page(str(ObjectId()), 10) == []


def test_the_line_number_counts_the_ranges_before_and_is_unknown_while_they_run(rejects, job):
    rejects.write(job, 0, [made(0, 3)])
    rejects.write(job, 1, [made(100, 3)])
    rejects.write(job, 2, [made(200, 3)])
    assert [reject["line"] for reject in rejects.page(job.id, 9)] == [4, 504, None]


@pytest.mark.parametrize("raw", [b"plain", "ünïcode ☃".encode(), b"\xff\xfe\x00", b"", "€".encode()[:2]])
def test_the_raw_bytes_come_back_as_they_were(rejects, job, raw):
    rejects.write(job, 0, [made(0, head=raw)])
    assert [line for _, line in rejects.lines(job.id)] == [raw]


def test_a_raw_line_that_was_cut_within_a_character_stays_text_and_tells_its_length(rejects, job):
    rejects.write(job, 0, [made(0, head=("x" * 9 + "€").encode()[:11], length=5000)])
    [told] = rejects.page(job.id, 9)
    assert (told["raw"], told["rawLength"], "encoding" in told) == ("x" * 9, 5000, False)
