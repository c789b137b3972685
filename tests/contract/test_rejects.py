"""What holds for rejects on a real MongoDB and on mongomock's model of it."""

from datetime import UTC, datetime
from types import SimpleNamespace

import mongomock
import pytest
from bson import ObjectId

from engine.control.rejects import Rejects
from engine.model import ByteRange, Job, JobOptions, JobState, Lease, Reason, Reject, Source, Tally


@pytest.fixture(params=["mongod", "mongomock"])
def rejects(request):
    ledger = SimpleNamespace(first_lines=lambda job_id, indexes: {0: 0, 1: 500})
    if request.param == "mongod":
        return Rejects(request.getfixturevalue("store"), ledger)
    return Rejects(SimpleNamespace(rejects=mongomock.MongoClient().db.rejects), ledger)


@pytest.fixture
def job():
    source = Source("bucket", "some/key", '"tag"', "", 1000)
    return Job(str(ObjectId()), "db", source, JobOptions(), JobState.PROCESSING, datetime.now(UTC))


def lease(job, index=0, number=1, confirmed=0):
    return Lease(job.id, ByteRange(index, 0, 2**41), "token", number, confirmed, Tally(), resumed=True)


def made(offset, ordinal=0, head=b"bad", length=None, reason=Reason.INVALID_JSON):
    return Reject(offset, len(head) if length is None else length, ordinal, reason, "why", head)


def test_rejects_are_paged_in_the_order_of_the_file_each_once(rejects, job):
    offsets = [5, 2**40, 0, 300, 2**31 + 1]
    rejects.write(job, lease(job), [made(offset) for offset in offsets])
    rejects.write(job, lease(job), [made(5), made(7)])  # a replay writes some of them again
    found, after = [], None
    while page := rejects.page(job.id, 2, after)[0]:
        found += page
        after = page[-1]["offset"]
    assert [reject["offset"] for reject in found] == sorted({*offsets, 7})


def test_a_page_of_long_lines_ends_before_its_limit(rejects, job, monkeypatch):
    monkeypatch.setattr("engine.control.rejects.PAGE_BYTES", 2500)
    rejects.write(job, lease(job), [made(1000 * number, head=b"x" * 1000) for number in range(4)])
    first, more = rejects.page(job.id, 1000)
    assert ([reject["offset"] for reject in first], more) == ([0, 1000, 2000], True)
    last, more = rejects.page(job.id, 1000, 2000)
    assert ([reject["offset"] for reject in last], more) == ([3000], False)


def test_another_jobs_rejects_are_not_shown(rejects, job):
    rejects.write(job, lease(job), [made(1)])
    assert rejects.page(str(ObjectId()), 10) == ([], False)


def test_the_line_number_counts_the_ranges_before_and_is_unknown_while_they_run(rejects, job):
    rejects.write(job, lease(job), [made(0, 3)])
    rejects.write(job, lease(job, 1), [made(100, 3)])
    rejects.write(job, lease(job, 2), [made(200, 3)])
    assert [reject["line"] for reject in rejects.page(job.id, 9)[0]] == [4, 504, None]


@pytest.mark.parametrize("raw", [b"plain", "ünïcode ☃".encode(), b"\xff\xfe\x00", b"", "€".encode()[:2]])
def test_the_raw_bytes_come_back_as_they_were(rejects, job, raw):
    rejects.write(job, lease(job), [made(0, head=raw)])
    assert list(rejects.lines(job.id)) == [raw]


def test_a_raw_line_that_was_cut_within_a_character_stays_text_and_tells_its_length(rejects, job):
    rejects.write(job, lease(job), [made(0, head=("x" * 9 + "€").encode()[:11], length=5000)])
    [told] = rejects.page(job.id, 9)[0]
    assert (told["raw"], told["rawLength"], "encoding" in told) == ("x" * 9, 5000, False)


def test_a_holder_takes_away_what_earlier_ones_left_beyond_the_mark_and_nothing_of_later_ones(rejects, job):
    rejects.write(job, lease(job, number=1), [made(5), made(50)])
    rejects.write(job, lease(job, number=3), [made(60)])
    rejects.forget(lease(job, number=2, confirmed=10))  # a zombie that wakes up while the third holder is at work
    assert [told["offset"] for told in rejects.page(job.id, 9)[0]] == [5, 60]
    rejects.forget(lease(job, number=4, confirmed=10))
    assert [told["offset"] for told in rejects.page(job.id, 9)[0]] == [5]


def test_what_a_later_holder_says_of_a_line_stands_and_a_zombie_does_not_take_it_back(rejects, job):
    rejects.write(job, lease(job, number=1), [made(5, head=b"first")])
    rejects.write(job, lease(job, number=3), [made(5, head=b"third"), made(6)])
    rejects.write(job, lease(job, number=2), [made(5, head=b"second")])
    assert [told["raw"] for told in rejects.page(job.id, 9)[0]] == ["third", "bad"]


def test_the_first_rejects_are_few_and_their_raw_lines_short(rejects, job):
    rejects.write(job, lease(job), [made(offset, head=b"x" * 1500) for offset in range(0, 90, 10)])
    told = rejects.first(job.id)
    assert [reject["offset"] for reject in told] == [0, 10, 20, 30, 40]
    assert {(len(reject["raw"]), reject["rawLength"]) for reject in told} == {(1000, 1500)}
