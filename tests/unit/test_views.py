"""What the API says about a job that nobody is working on. No servers."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from api.views import is_idle, job_status, waiting_for
from engine.control.history import RangeReport
from engine.model import Event, Job, JobOptions, JobState, Progress, RangeState, Source, Stop, Tally

MADE = datetime(2026, 11, 26, tzinfo=UTC)
JOB = Job("6b04", "records", Source("b", "k", '"e"', None, 100), JobOptions(), JobState.PENDING, MADE)


def report(put_off=None, **states):
    kept = states.get("LEASED", 0) - states.pop("stale", 0)
    return RangeReport({RangeState(state): count for state, count in states.items()}, kept, 0, 0, (), put_off)


@pytest.mark.parametrize(
    ("job", "ranges", "idle"),
    [
        (JOB, report(), True),
        (replace(JOB, state=JobState.PROCESSING), report(), True),  # its ranges have yet to be made
        (replace(JOB, state=JobState.PROCESSING), report(READY=3, DONE=1), True),
        (replace(JOB, state=JobState.PROCESSING), report(READY=3, LEASED=1), False),
        (replace(JOB, state=JobState.PROCESSING), report(DONE=4), True),  # it has yet to be ended
        (replace(JOB, state=JobState.COMPLETED), report(DONE=4), False),
        (replace(JOB, state=JobState.PROCESSING), report(LEASED=2, stale=1), False),
        (replace(JOB, state=JobState.PROCESSING), report(LEASED=2, stale=2), True),  # leases of a host that died
        (replace(JOB, stopping=Stop(JobState.CANCELLED, None)), report(READY=1, LEASED=1), False),
        (replace(JOB, stopping=Stop(JobState.CANCELLED, None)), report(LEASED=1, stale=1), True),
    ],
)
def test_a_job_is_idle_until_it_has_ended_while_nobody_works_on_it(job, ranges, idle):
    assert is_idle(job, ranges) is idle


@pytest.mark.parametrize(
    ("job", "ranges"),
    [
        (
            replace(JOB, stopping=Stop(JobState.CANCELLED, None), options=JobOptions(run_at=MADE.replace(year=2099))),
            report(),
        ),
        (replace(JOB, state=JobState.PROCESSING), report()),  # its planner died before it made the ranges
        (replace(JOB, state=JobState.PROCESSING), report(DONE=3, FAILED=1)),  # its last worker died before ending it
    ],
)
def test_a_job_that_is_to_be_settled_waits_for_a_worker_at_most(job, ranges):
    assert waiting_for(job, ranges, paused=True, workers=1) is None
    assert "none is alive" in waiting_for(job, ranges, paused=True, workers=0)


@pytest.mark.parametrize(
    ("job", "ranges", "paused", "workers", "said"),
    [
        (JOB, report(), False, 2, "its turn"),
        (JOB, report(), False, 0, "none is alive"),
        (JOB, report(), True, 0, "paused"),
        (
            replace(JOB, options=JobOptions(run_at=datetime(2099, 1, 1, tzinfo=UTC))),
            report(),
            True,
            0,
            "its start time, 2099-",
        ),
        (replace(JOB, options=JobOptions(run_at=MADE.replace(year=2020))), report(), False, 1, "its turn"),
        (
            replace(JOB, timeline=(Event(MADE, "put off: S3 is away"),)),
            report(),
            False,
            1,
            "another try; the last one failed: S3 is away",
        ),
        (
            replace(JOB, timeline=(Event(MADE, "put off: S3 is away"), Event(MADE, "retried"))),
            report(),
            False,
            1,
            "its turn",
        ),
        (replace(JOB, state=JobState.PROCESSING), report("S3 is slow", READY=1), False, 1, "failed: S3 is slow"),
        (
            replace(JOB, state=JobState.PROCESSING, timeline=(Event(MADE, "put off: before the plan"),)),
            report(READY=1),
            False,
            1,
            "its turn",
        ),
    ],
)
def test_what_an_idle_job_waits_for(job, ranges, paused, workers, said):
    assert said in waiting_for(job, ranges, paused=paused, workers=workers)


@pytest.mark.parametrize(("rate", "left"), [(100.0, 9.0), (10.0, 90.0), (6.0, None), (0.001, None), (0.0, None)])
def test_the_time_left_is_not_told_while_a_job_stalls(rate, left):
    """100 lines of one byte in the first second of work, of which a thousand bytes are to come; `rate` is that of late."""
    progress = Progress(Tally(lines=100, bytes=100), 1, 0, rate, MADE + timedelta(seconds=61))
    job = replace(JOB, state=JobState.PROCESSING, source=replace(JOB.source, size=1000), started_at=MADE)
    told = job_status(replace(job, progress=progress, idle_seconds=60.0))
    assert told["progress"]["secondsLeft"] == left
