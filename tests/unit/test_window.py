"""How many batches are in flight, by how much of their time the round trip takes."""

import pytest

from engine.load.window import MOST_TIMES, Window


@pytest.mark.parametrize(
    ("waited", "round_trip", "size"),
    [
        (0.040, 0.0, 4),
        (0.040, 0.0003, 4),
        (0.060, 0.020, 6),
        (0.040, 0.020, 8),
        (0.021, 0.020, 4 * MOST_TIMES),
        (0.0, 0.0, 4),
        (0.0, 0.5, 4),
    ],
)
def test_as_many_are_under_way_as_keep_the_same_number_with_the_database(waited, round_trip, size):
    window = Window(4)
    for _ in range(3):
        window.fit(waited, round_trip)
    assert window.size == size


def test_it_follows_what_becomes_slow_and_quick_again():
    window = Window(4)
    sizes = []
    for waited in (0.025, 0.4, 0.025):
        for _ in range(200):
            window.fit(waited, 0.020)
        sizes.append(window.size)
    assert sizes == [8, 4, 8]


def test_one_slow_batch_among_many_changes_little():
    window = Window(4)
    for _ in range(200):
        window.fit(0.025, 0.020)
    window.fit(0.4, 0.020)
    assert window.size > 4
