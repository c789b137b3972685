"""A worker looks for garbage that holds cycles only now and then: what it drops after a batch must hold none."""

import gc
import weakref

import orjson
import pytest

from engine.batches import Batch
from engine.decode import decode
from engine.model import Format, Plan
from engine.sink import Sink

TAG = b"\0" * 6


class Watched(list):
    """A list that can be watched."""


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
def test_a_batch_with_a_refused_document_leaves_no_cycle(store, line):
    sink = Sink(store, "records", Plan(Format.NDJSON, TAG, 1, 1, True), 10)
    gc.collect()
    gc.disable()
    try:
        for turn in range(3):
            lines = [b'{"_id":1,"turn":%d}' % turn, line, b'{"b":1}']
            batch = Batch(turn * 10**8, turn * 10**8 + sum(map(len, lines)) + 3, 0, lines)
            decoded = decode(batch, Format.NDJSON, TAG, "key")
            documents = Watched(decoded.documents)
            object.__setattr__(decoded, "documents", documents)
            watched = weakref.ref(documents)
            tally, rejects = sink.write(batch, decoded)
            assert tally.lines == 3
            assert rejects
            del documents, decoded, batch, rejects
            assert watched() is None
    finally:
        gc.enable()
    assert orjson.loads(b"1") == 1
