"""Runs of digits that may be an integer outside int64 are found wherever they stand, in few passes over the bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.integers import has_wide_digits, may_have_wide_digits


@given(
    st.lists(st.integers(0, 24), min_size=1, max_size=12), st.sampled_from([b",", b'"x', b"e-", b"."]), st.booleans()
)
def test_runs_of_19_digits_are_found_wherever_they_stand(runs, between, alone):
    data = between.join(b"7" * run for run in runs)
    found = may_have_wide_digits(data if alone else b" " * 32 + data + b" " * 32)
    if max(runs) >= 19:
        assert found
    elif not alone:  # at the edges of a batch, it may be a false alarm
        assert not found


@pytest.mark.parametrize(
    ("text", "wide"), [(b"3.%b", False), (b"-%b", True), (b"%b", True), (b'"a": 0.%b, "b": 1', False)]
)
def test_a_long_run_of_digits_is_looked_at_once(text, wide):
    looks = []

    class Counting(bytes):
        def find(self, *given):
            looks.append(given)
            return super().find(*given)

        def translate(self, *given):
            return Counting(super().translate(*given))

    assert has_wide_digits(Counting(text % (b"1415926535" * 10_000))) is wide
    assert len(looks) <= 2


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize(
    ("number", "wide"),
    [
        (b"9223372036854775807", False),
        (b"9223372036854775808", True),
        (b"-9223372036854775808", False),
        (b"-9223372036854775809", True),
        (b"10000000000000000000", True),
        (b"0.9999999999999999999", False),
        (b"1" * 18, False),
        (b"7" * 39, True),
        (b"7" * 100, True),
    ],
)
def test_a_wide_integer_in_a_large_batch_is_found_wherever_it_stands(number, wide, shift):
    assert may_have_wide_digits(b" " * (4096 + shift) + number + b" " * 4096) is wide
