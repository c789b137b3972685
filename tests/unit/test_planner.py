"""Into how many ranges an object is cut."""

from datetime import UTC, datetime
from unittest.mock import MagicMock

import pytest

from engine.control.sources import Registered
from engine.load.planner import Planner, _Draft
from engine.model import Format, Job, JobOptions, JobState, Source
from engine.settings import Settings

MIB, TIB = 2**20, 2**40


@pytest.mark.parametrize(
    ("size", "workers", "range_bytes", "ranges"),
    [
        (0, 4, 64 * MIB, 0),
        (1, 4, 64 * MIB, 1),
        (8 * MIB, 4, 64 * MIB, 1),  # no smaller ones only to have more of them
        (8 * MIB + 1, 4, 64 * MIB, 2),
        (160 * MIB, 4, 64 * MIB, 16),  # four for each worker
        (160 * MIB, 1, 64 * MIB, 4),
        (160 * MIB, 4, MIB, 160),
        (1600 * MIB, 1, 64 * MIB, 25),
        (5 * TIB, 4, 64 * MIB, 81_920),
        (5 * TIB, 4, MIB, 100_000),  # never more, whatever the settings
    ],
)
def test_an_object_is_cut_into_enough_ranges_for_all_workers_and_never_too_many(size, workers, range_bytes, ranges):
    settings = Settings(engine_workers=workers, engine_range_bytes=range_bytes, engine_max_line_bytes=12345)
    planner = Planner(MagicMock(), MagicMock(), MagicMock(), MagicMock(), MagicMock(), settings)
    source = Source("bucket", "key", '"etag"', "", size)
    job = Job("0" * 24, "data", source, JobOptions(), JobState.PENDING, datetime.now(UTC))
    plan = planner._plan(_Draft(job, b"", Format.TEXT), Registered(b"tagtag", True, None))
    planner.close()
    assert plan.range_count == ranges
    assert plan.max_line_bytes == 12345
