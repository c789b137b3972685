"""What writing a batch holds in memory, on a real MongoDB.

It must leave no cycles behind, since a worker collects these only now and then.
"""

import gc
import tracemalloc
import weakref

import pytest

from engine.load.sink import Sink, Work
from engine.model import Format, Plan
from engine.text.decode import decode
from tests.conftest import batch_of

TAG = b"\0" * 6


class Watched(list):
    """A list that can be weakly referenced."""


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":"%s"}' % (b"x" * (16 * 2**20 + 10)),
        b'{"a":"%s"}' % (b"x" * (20 * 2**20)),
        b'{"a\\u0000b":1}',
        b'{"a":' * 190 + b"1" + b"}" * 190,
        b'{"a":' * 600 + b"1" + b"}" * 600,
        b'{"_id":[1]}',
        b'{"_id":1}',
    ],
    ids=["just too large", "too large", "bad key", "too deep", "far too deep", "bad id", "duplicate"],
)
def test_a_batch_with_a_refused_document_leaves_no_cycle(store, monkeypatch, line):
    sink = Sink(store, "records", Plan(Format.NDJSON, TAG, 1, 1, True, 2**25), 10)
    watched = []
    real = Work.materialize

    def materialize(work):
        documents = Watched(real(work))
        watched.append(weakref.ref(documents))
        return documents

    monkeypatch.setattr(Work, "materialize", materialize)
    gc.collect()
    gc.disable()
    try:
        for turn in range(3):
            batch = batch_of(b'{"_id":1,"turn":%d}' % turn, line, b'{"b":1}', offset=turn * 10**8)
            documents = decode(batch, Format.NDJSON, TAG, "key")
            watched.append(weakref.ref(documents))
            tally, rejects = sink.write(documents)
            assert tally.lines == 3
            assert rejects
            del documents, batch, rejects
            assert [reference() for reference in watched] == [None] * len(watched)
    finally:
        gc.enable()


def test_what_small_lines_collide_with_may_be_larger_than_memory(store):
    """Documents that have the lines' `_id`s, 240 MiB in all, are compared one at a time."""
    sink = Sink(store, "records", Plan(Format.NDJSON, TAG, 1, 1, False, 2**25), 10)
    for first in range(0, 120, 10):
        store.data["records"].insert_many({"_id": key, "text": "x" * 2**21} for key in range(first, first + 10))
    documents = decode(batch_of(*(b'{"_id":%d}' % key for key in range(120))), Format.NDJSON, TAG, "key")
    tracemalloc.start()
    try:
        tally, rejects = sink.write(documents)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tally.inserted, tally.duplicates, len(rejects)) == (0, 0, 120)
    assert peak < 120 * 2**20
