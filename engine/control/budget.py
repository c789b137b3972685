"""How many rejects a job tolerates. A pure function."""

from decimal import Decimal
from typing import Final

from engine.model import Failure, JobOptions, Tally

__all__ = ["overspent"]

LINES_FIRST: Final = 10_000
"""A percentage is checked from this many lines on, and at the end."""


def overspent(options: JobOptions, tally: Tally, *, final: bool) -> Failure | None:
    """The failure of a job that has rejected more lines than its `max_errors` allows; None if it has not.

    Args:
        options: `max_errors` is a count, or a percentage such as "2%" of the lines read.
        tally: the sum over all its ranges.
        final: whether all lines have been read. Until then, a percentage is not checked below 10,000 lines.
    """
    allowed = options.max_errors
    if isinstance(allowed, int):
        over = tally.rejected > allowed
    else:
        over = (final or tally.lines >= LINES_FIRST) and tally.rejected * 100 > Decimal(
            allowed.rstrip("%")
        ) * tally.lines
    if not over:
        return None
    return Failure(
        "too_many_errors",
        f"{tally.rejected} of {tally.lines} lines{'' if final else ' read so far'} were rejected, but maxErrors allows "
        f"{allowed}: see the rejects, fix the file, or submit a new job with a higher maxErrors"
        f"{'' if options.validate else '; what was written stays'}",
    )
