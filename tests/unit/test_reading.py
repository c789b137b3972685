"""Which bytes of an object are requested to read one of its ranges. No servers."""

import threading
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest

from engine.control.stats import Stats
from engine.load.reading import Reading
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
