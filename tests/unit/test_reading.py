"""Which bytes of an object are requested to read one of its ranges. No servers."""

import threading
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest

from engine.control.stats import Stats
from engine.errors import ObjectChanged, Transient
from engine.load.reading import BEYOND_BYTES, Reading
from engine.load.run import Run
from engine.model import ByteRange, Lease, Tally
from engine.text.lines import Splitter


def test_what_was_read_ahead_may_reach_beyond_all_of_a_range(monkeypatch):
    size, head = 10 * 2**20, b" " * 4 * 2**20
    lease = Lease("0" * 24, ByteRange(0, 0, 2**20), "token", 1, 0, Tally(), 0, 0, False)
    job = SimpleNamespace(source=SimpleNamespace(size=size))
    run = Run(job, lease, threading.Event(), lambda: None, head)
    asked = []

    def answer(source, start, stop):
        asked.append((start, stop))
        reader = MagicMock()
        reader.__enter__.return_value = reader
        reader.read.side_effect = [b" " * (stop - start), b""]
        return reader

    reading = Reading(Mock(open=answer), Stats(), 2**20)
    chunks = []
    splitter = Splitter(0, 2**20, 2**30)
    for chunk in reading._chunks(run, splitter):
        splitter.feed(chunk)
        chunks.append(chunk)
    assert sum(map(len, chunks)) == size
    assert asked[0][0] == len(head)
    assert all(start < stop <= size for start, stop in asked)


@pytest.mark.parametrize("flag", ["stop", "cancelled", "lost"])
def test_a_line_without_an_end_is_read_no_further_when_the_work_is_to_end(flag):
    lease = Lease("0" * 24, ByteRange(0, 0, 2**40), "token", 1, 0, Tally(), 0, 0, False)
    run = Run(SimpleNamespace(source=SimpleNamespace(size=2**40)), lease, threading.Event(), lambda: None)
    reads = []
    reader = MagicMock()
    reader.__enter__.return_value = reader

    def read(size, moved):
        reads.append(size)
        if len(reads) == 3:
            getattr(run, flag).set()
        return b"x" * 1000

    reader.read = read
    reading = Reading(Mock(open=lambda *where: reader), Stats(), 2**20)
    chunks = list(reading._chunks(run, Splitter(0, 2**40, 2**20)))
    assert len(chunks) == len(reads) == 3


class Answers:
    """An S3 whose requests hang until they are let go, and then raise what is in `errors`, or return a reader."""

    def __init__(self, *errors, hang=False):
        self.asked, self.readers, self.errors = [], [], list(errors)
        self.let_go, self.arrived = threading.Event(), threading.Event()
        if not hang:
            self.let_go.set()

    def open(self, source, start, stop):
        self.asked.append((source, start, stop))
        self.arrived.set()
        assert self.let_go.wait(30)
        if self.errors:
            raise self.errors.pop(0)
        reader = MagicMock()
        reader.__enter__.return_value = reader
        reader.read.side_effect = [b" " * (stop - start), b""]
        self.readers.append(reader)
        return reader


@pytest.fixture
def reading_of():
    """Makes a Reading of some answers; a request that was sent ahead has been answered once it is closed."""
    made = []

    def make(answers):
        made.append(Reading(answers, Stats(), 2**20))
        return made[-1]

    yield make
    for one in made:
        one.close()


def next_run(start=1000, end=2000, confirmed=1000):
    lease = Lease("0" * 24, ByteRange(1, start, end), "token", 1, confirmed, Tally(), 0, 0, False)
    return Run(SimpleNamespace(source=SimpleNamespace(size=10**6)), lease, threading.Event(), lambda: None, ahead=True)


def read(reading, run):
    lease = run.lease
    splitter, chunks = Splitter(lease.confirmed, lease.range.end, 2**20), []
    for chunk in reading._chunks(run, splitter):
        splitter.feed(chunk + b"\n")
        chunks.append(chunk)
    return chunks


def test_the_bytes_of_the_next_range_are_requested_before_it_begins(reading_of):
    answers, run = Answers(), next_run()
    reading = reading_of(answers)
    reading.request(run)
    assert answers.arrived.wait(30)
    assert answers.asked == [(run.job.source, 999, 2000 + BEYOND_BYTES)]
    assert list(map(len, read(reading, run))) == [2000 + BEYOND_BYTES - 999]
    assert len(answers.asked) == 1
    answers.readers[0].__exit__.assert_called_once()
    reading.forget(run)
    answers.readers[0].drop.assert_not_called()


def test_the_range_at_hand_does_not_take_what_was_requested_for_the_next(reading_of):
    answers, run, following = Answers(), next_run(0, 1000, 0), next_run()
    reading = reading_of(answers)
    reading.request(following)
    assert answers.arrived.wait(30)
    read(reading, run)
    reading.forget(run)
    assert [start for _, start, _ in answers.asked] == [999, 0]
    read(reading, following)
    assert len(answers.asked) == 2


def test_of_a_range_that_is_confirmed_to_its_end_nothing_is_requested(reading_of):
    answers, run = Answers(), next_run(confirmed=2000)
    reading = reading_of(answers)
    reading.request(run)
    assert read(reading, run) == []
    reading._requests.submit(lambda: None).result()
    assert answers.asked == []


def test_a_request_that_was_sent_ahead_in_vain_is_repeated_at_once(reading_of):
    answers, run = Answers(Transient("away")), next_run()
    reading = reading_of(answers)
    reading.request(run)
    assert answers.arrived.wait(30)
    assert len(read(reading, run)) == 1
    assert len(answers.asked) == 2
    assert "retries" not in reading._stats.counts()


def test_what_a_request_that_was_sent_ahead_finds_out_is_final(reading_of):
    answers, run = Answers(ObjectChanged("overwritten")), next_run()
    reading = reading_of(answers)
    reading.request(run)
    assert answers.arrived.wait(30)
    with pytest.raises(ObjectChanged):
        read(reading, run)
    assert len(answers.asked) == 1


def test_an_answer_that_breaks_off_while_it_waits_is_requested_again(reading_of, monkeypatch):
    monkeypatch.setattr("engine.load.reading.back_off", lambda run, tries: 0.0)
    answers, run = Answers(), next_run()
    reading = reading_of(answers)
    reading.request(run)
    reading._requests.submit(lambda: None).result()
    answers.readers[0].read.side_effect = Transient("broke off")
    answers.readers[0].__exit__.return_value = False
    assert len(read(reading, run)) == 1
    assert [start for _, start, _ in answers.asked] == [999, 999]


def test_an_answer_that_nobody_uses_is_dropped_even_if_it_comes_late(reading_of):
    answers, run = Answers(hang=True), next_run()
    reading = reading_of(answers)
    reading.request(run)
    assert answers.arrived.wait(30)
    reading.forget(run)  # without waiting
    answers.let_go.set()
    reading._requests.submit(lambda: None).result()
    answers.readers[0].drop.assert_called_once()
    reading.request(run)
    reading._requests.submit(lambda: None).result()
    reading.forget(run)
    answers.readers[1].drop.assert_called_once()


def test_a_request_in_vain_that_nobody_uses_is_forgotten_in_silence(reading_of, caplog):
    answers, run = Answers(Transient("away")), next_run()
    reading = reading_of(answers)
    reading.request(run)
    reading._requests.submit(lambda: None).result()
    reading.forget(run)
    assert (len(answers.asked), answers.readers, caplog.records) == (1, [], [])
    assert len(read(reading, run)) == 1
    assert len(answers.asked) == 2


def test_a_range_does_not_wait_behind_the_request_of_another_that_hangs(reading_of):
    answers, run, following = Answers(hang=True), next_run(), next_run(2000, 3000, 2000)
    reading = reading_of(answers)
    reading.request(run)
    assert answers.arrived.wait(30)
    reading.forget(run)
    reading.request(following)
    quick = Answers()
    reading._objects = quick
    assert len(read(reading, following)) == 1
    assert [start for _, start, _ in quick.asked] == [1999]
    answers.let_go.set()
    reading._requests.submit(lambda: None).result()
    assert [start for _, start, _ in answers.asked] == [999]
