"""The confirmed offset rises only over what is acknowledged without a gap, in whatever order batches finish."""

from hypothesis import given
from hypothesis import strategies as st

from engine.load.watermark import Watermark
from engine.model import Tally


@given(st.integers(1, 30).flatmap(lambda n: st.permutations(range(n))))
def test_the_mark_is_the_end_of_the_longest_acknowledged_beginning(order):
    mark = Watermark(100, Tally(lines=5))
    slots = [mark.open(100 + 10 * (i + 1)) for i in range(len(order))]
    closed = set()
    for i in order:
        mark.close(slots[i], Tally(lines=1, bytes=10))
        closed.add(i)
        whole = next(n for n in range(len(order) + 1) if n not in closed)
        assert (mark.confirmed, mark.tally.lines, mark.tally.bytes) == (100 + 10 * whole, 5 + whole, 10 * whole)
