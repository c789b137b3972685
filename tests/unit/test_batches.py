"""Batches hold every line once and in order, at its offset, within the limits on lines and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.batches import Batcher
from engine.text.lines import Splitter
from tests.conftest import batch_of


@given(st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")), max_size=80), st.booleans(), st.data())
def test_batches_hold_the_lines_of_the_file_each_once_at_its_offset(lines, terminated, draw):
    data = b"\n".join(lines) + (b"\n" if terminated and lines else b"")
    most, room = draw.draw(st.integers(1, 12)), draw.draw(st.integers(1, 200))
    splitter, batcher, batches = Splitter(0, len(data), 10_000), Batcher(most, room), []
    step = draw.draw(st.integers(1, 50))
    for at in range(0, len(data), step):
        for block in splitter.feed(data[at : at + step]):
            batches += batcher.add(block)
    for block in splitter.finish():
        batches += batcher.add(block)
    batches += batcher.flush()
    at = ordinal = 0
    for batch in batches:
        assert (batch.offset, batch.ordinal) == (at, ordinal)
        assert 1 <= batch.count <= most
        assert batch.count == 1 or len(batch.data) <= room
        lines = [batch.line(position) for position in range(batch.count)]
        assert data[batch.offset : batch.end] == batch.data == b"\n".join(lines) + b"\n" * batch.terminated
        at, ordinal = batch.end, ordinal + batch.count
    assert at == len(data)


def test_a_batch_weighs_what_it_has_in_bytes_and_one_of_small_values_more():
    plain, text = b'{"name":"value","number":12345678}\n' * 1000, b'{"t":"' + b"x" * 10**6 + b'"}\n'
    assert [batch_of(*data.splitlines()).weight for data in (plain, text)] == [len(plain), len(text)]
    for element, times in ((b"1", 3), (b"[]", 4), (b"[" * 50 + b"]" * 50, 3), (b"12345", 1)):
        line = b"[%b]" % b",".join([element] * (10**6 // len(element)))
        assert batch_of(line).weight == pytest.approx(times * len(line), rel=0.03)


def test_batches_of_small_values_hold_fewer_bytes():
    line = b"[%b]\n" % b",".join([b"1"] * 500)
    data = line * 1000
    splitter, batcher = Splitter(0, len(data), len(data)), Batcher(1000, 100_000)
    batches = [batch for block in splitter.feed(data) for batch in batcher.add(block)] + [*batcher.flush()]
    assert b"".join(batch.data for batch in batches) == data
    first, *others, _ = batches
    assert 3 * 90_000 < first.weight < 3 * 101_000  # its weight is known only once it is there
    assert all(85_000 < batch.weight < 115_000 for batch in others)


def test_lines_after_an_oversized_one_keep_their_numbers():
    data = b"a\n" + b"x" * 40 + b"\nb\n"
    splitter, batcher = Splitter(0, len(data), 10), Batcher(5, 100)
    batches = [batch for block in splitter.feed(data) for batch in batcher.add(block)] + [*batcher.flush()]
    assert [(batch.offset, batch.end, batch.ordinal, batch.count) for batch in batches] == [
        (0, 2, 0, 1),
        (2, 43, 1, 1),
        (43, 45, 2, 1),
    ]
