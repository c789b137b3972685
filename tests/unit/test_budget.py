"""How many rejects a job tolerates."""

import pytest

from engine.control.budget import overspent
from engine.model import JobOptions, Tally


@pytest.mark.parametrize(
    ("allowed", "rejected", "lines", "running", "ended"),
    [
        (0, 0, 10, False, False),
        (0, 1, 10, True, True),
        (1000, 1000, 1000, False, False),
        (1000, 1001, 10**9, True, True),
        ("2%", 200, 10_000, False, False),
        ("2%", 201, 10_000, True, True),
        ("2%", 9_999, 9_999, False, True),  # judged only at the end: the first lines may be the bad ones
        ("0%", 0, 0, False, False),
        ("0%", 1, 20_000, True, True),
        ("100%", 20_000, 20_000, False, False),
        ("0.000001%", 1, 10**8, False, False),
        ("0.000001%", 2, 10**8, True, True),
        ("33.333333%", 1, 3, False, True),
        ("33.333334%", 1, 3, False, False),
    ],
)
def test_a_budget_is_a_count_or_a_share_that_is_judged_exactly(allowed, rejected, lines, running, ended):
    options, tally = JobOptions(max_errors=allowed), Tally(lines=lines, rejected=rejected)
    assert (overspent(options, tally, final=False) is not None) is running
    assert (overspent(options, tally, final=True) is not None) is ended


@pytest.mark.parametrize("dry", [True, False])
def test_only_of_a_load_it_is_said_that_something_was_written(dry):
    failure = overspent(JobOptions(max_errors=0, validate=dry), Tally(lines=1, rejected=1), final=True)
    assert ("what was written stays" in failure.message) is not dry


def test_a_budget_that_is_spent_says_what_to_do():
    failure = overspent(JobOptions(max_errors=3), Tally(lines=10, rejected=4), final=False)
    assert failure.code == "too_many_errors"
    assert failure.message.startswith(
        "4 of 10 lines read so far were rejected, but maxErrors allows 3: see the rejects"
    )
