"""For any bytes and any cut into ranges, the ranges together yield exactly the lines of the object, each once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model import ByteRange
from engine.text.batches import Batcher
from engine.text.lines import Block, Oversized, Splitter
from engine.text.ranges import count, cut

pieces = st.sampled_from([b"\n", b"\r\n", b"\r", b"a", b"bc", "é€𝄞".encode(), b" ", b"{}", b"x" * 40, b"\xff", b"\0"])
contents = st.lists(pieces, max_size=60).map(b"".join) | st.binary(max_size=200)


def whole(data: bytes) -> list[tuple[int, bytes]]:
    """The lines of a file with their offsets, found in the simplest way."""
    found, offset = [], 0
    for line in data.split(b"\n"):
        found.append((offset, line))
        offset += len(line) + 1
    if not found[-1][1]:
        found.pop()
    return found


def ranges_of(size: int, range_bytes: int) -> list[ByteRange]:
    of = count(size, range_bytes)
    return [cut(size, of, index) for index in range(of)]


def read(data: bytes, start: int, end: int, sizes: list[int], most: int = 1 << 20) -> list[Block | Oversized]:
    splitter = Splitter(start, end, most)
    out: list[Block | Oversized] = []
    at, turn = splitter.read_from, 0
    while not splitter.done and at < len(data):
        size = sizes[turn % len(sizes)]
        out += splitter.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    return out + splitter.finish()


def lines(blocks: list[Block | Oversized]) -> list[tuple[int, bytes]]:
    found = []
    for block in blocks:
        assert isinstance(block, Block)
        start = block.start
        for end in block.ends.tolist():
            found.append((block.offset + start - block.start, block.data[start:end]))
            start = end + 1
    return found


@settings(max_examples=500)
@given(
    contents,
    st.integers(1, 250),
    st.lists(st.integers(1, 64), min_size=1, max_size=8),
    st.sampled_from([0, 1, 3, 16]),
)
def test_any_cut_and_any_chunking_yield_each_line_once(data, range_bytes, sizes, few):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.text.lines.FEW_LINES", few)
        found = [line for r in ranges_of(len(data), range_bytes) for line in lines(read(data, r.start, r.end, sizes))]
    assert found == (whole(data) if data else [])


@pytest.mark.parametrize(
    "data",
    [
        b"short\n" * 5000,
        (b"x" * 5000 + b"\n") * 40,
        (b"x" * 5000 + b"\n") * 40 + b"short\n" * 100_000,
        b"short\n" * 15 + (b"x" * 5000 + b"\n") * 40,
    ],
    ids=["short", "long", "long ones first", "short ones first"],
)
def test_long_lines_and_short_ones_come_out_alike(data):
    found = lines(read(data, 0, len(data), [1 << 20]))
    assert found == whole(data)


@settings(max_examples=300)
@given(contents, st.integers(1, 250), st.integers(1, 30), st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_a_line_over_the_limit_is_told_once_with_its_length_and_the_others_come_through(data, range_bytes, most, sizes):
    expected = []
    for offset, line in whole(data) if data else []:
        terminated = offset + len(line) < len(data)
        length = len(line) - (terminated and line.endswith(b"\r"))
        expected.append((offset, line) if length <= most else (offset, length, line[:length][:65536]))
    found = []
    for r in ranges_of(len(data), range_bytes):
        for block in read(data, r.start, r.end, sizes, most):
            found += [(block.offset, block.length, block.head)] if isinstance(block, Oversized) else lines([block])
    assert found == expected


@settings(max_examples=200)
@given(
    contents.filter(bool), st.integers(1, 20), st.integers(1, 100), st.lists(st.integers(1, 64), min_size=1, max_size=8)
)
def test_batches_hold_the_same_lines_and_meet_end_to_end(data, max_lines, max_bytes, sizes):
    batcher, batches = Batcher(max_lines, max_bytes), []
    for block in read(data, 0, len(data), sizes):
        batches += batcher.add(block)
    batches += batcher.flush()
    assert [batch.line(position) for batch in batches for position in range(batch.count)] == [
        line for _, line in whole(data)
    ]
    assert [batch.offset for batch in batches] == [0, *(batch.end for batch in batches[:-1])]
    assert batches[-1].end == len(data)
    assert all(batch.count <= max_lines for batch in batches)
    assert all(len(batch.data) <= max_bytes or batch.count == 1 for batch in batches)
    assert [batch.ordinal for batch in batches] == [sum(b.count for b in batches[:i]) for i in range(len(batches))]


def test_a_line_longer_than_several_ranges_belongs_to_the_first_of_them():
    data = b"a\n" + b"x" * 1000 + b"\nb\n"
    owners = [
        r.index
        for r in ranges_of(len(data), 100)
        for _, line in lines(read(data, r.start, r.end, [64]))
        if len(line) > 1
    ]
    assert owners == [0]


def test_an_endless_line_is_not_kept():
    splitter = Splitter(0, 10, 1024 * 1024)
    for _ in range(100):
        splitter.feed(b"x" * 1024 * 1024)
    held = sum(map(len, splitter._carry))
    assert held <= 64 * 1024
    [told] = splitter.feed(b"\n")
    assert (told.length, told.end) == (100 * 1024 * 1024, 100 * 1024 * 1024 + 1)


@pytest.mark.parametrize("step", [1, 7, 30, 1 << 20])
@pytest.mark.parametrize(
    "lines",
    [
        [b"a", b"x" * 40, b"b"],
        [b"x" * 11, b"aaa", b"x" * 12],
        [b"x" * 40, b"a", b"y" * 12, b"b"],
        [b"x" * 40, b"a", b"b"],
        [b"a", b"b", b"x" * 40],
        [b"a", b"x" * 40, b"y" * 50, b"b", b"z" * 60],
        [b"a", b"x" * 10 + b"\r", b"y" * 11 + b"\r", b"b" * 10, b"c" * 11, b"d\r"],
    ],
)
def test_lines_over_the_limit_and_their_neighbours_come_through_in_one_chunk(lines, step):
    data = b"".join(line + b"\n" for line in lines)
    splitter, found = Splitter(0, len(data), 10), []
    for at in range(0, len(data), step):
        for block in splitter.feed(data[at : at + step]):
            if isinstance(block, Oversized):
                found.append((block.offset, block.length, block.head, block.end))
                continue
            start = block.start
            for end in block.ends.tolist():
                found.append((block.offset + start - block.start, block.data[start:end]))
                start = end + 1
    expected, offset = [], 0
    for line in lines:
        length = len(line.removesuffix(b"\r"))
        end = offset + len(line) + 1
        expected.append((offset, line) if length <= 10 else (offset, length, line[:length], end))
        offset = end
    assert found == expected
