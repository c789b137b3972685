"""Ranges: in order, without gap or overlap, from the first byte to the last, none larger than requested."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.ranges import count, cut


def ranges_of(size, range_bytes):
    of = count(size, range_bytes)
    return [cut(size, of, index) for index in range(of)]


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_ranges_cover_the_object_exactly(size, range_bytes):
    if size // range_bytes > 2000:
        range_bytes = size
    ranges = ranges_of(size, range_bytes)
    at = 0
    for number, found in enumerate(ranges):
        assert (found.index, found.start) == (number, at)
        assert 0 < found.end - found.start <= range_bytes
        at = found.end
    assert at == size


@given(st.integers(1, 2**48), st.integers(1, 2**30))
def test_ranges_are_even_to_a_byte(size, range_bytes):
    of = count(size, range_bytes)
    sizes = {cut(size, of, i).end - cut(size, of, i).start for i in {0, of // 2, of - 1}}
    assert max(sizes) - min(sizes) <= 1


def test_an_empty_object_has_no_range_and_nonsense_is_refused():
    assert ranges_of(0, 10) == []
    with pytest.raises(ValueError, match="positive"):
        count(1, 0)
