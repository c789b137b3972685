"""Jobs, batches and files as clients see them."""

from datetime import UTC, datetime, timedelta
from typing import Final, cast

from api.answers import BatchStatus, JobDetail, JobStatus, RejectBody, UploadAnswer
from engine.control.history import RangeReport
from engine.control.job_batches import JobBatch
from engine.control.jobs import PUT_OFF
from engine.model import TERMINAL, Job, JobState, RangeState, Source

__all__ = ["batch_status", "is_idle", "job_detail", "job_status", "moment", "stored_file", "waiting_for"]

NO_WORKER: Final = "a worker: none is alive (start `headrace engine`)"

STALLED: Final = 16
"""A job whose rate is this many times lower than on the whole has stalled."""

WHOLE_WITHIN: Final = timedelta(hours=1)
"""How long the request for a batch may take to create its jobs; after that it has died."""


def stored_file(source: Source) -> UploadAnswer:
    """The answer for a file that was just stored."""
    return {
        "message": "File uploaded successfully",
        "fileKey": source.key,
        "size": source.size,
        "etag": source.etag.strip('"'),
    }


def job_status(job: Job) -> JobStatus:
    """A job's state and progress."""
    progress, tally, size = job.progress, job.progress.tally, job.source.size
    done = size if job.state is JobState.COMPLETED else min(tally.bytes, size)
    rate = progress.rate
    if job.state in TERMINAL and job.started_at and job.finished_at:
        worked = (job.finished_at - job.started_at).total_seconds() - job.idle_seconds
        rate = tally.lines / max(worked, 0.001)
    left: float | None = None
    if job.state in TERMINAL:
        left = 0.0
    elif rate > 0 and tally.lines and not _stalls(job):
        left = round((size - done) / (rate * tally.bytes / tally.lines), 1)
    failure = job.failure or (job.stopping.failure if job.stopping else None)
    return {
        "jobId": job.id,
        "fileKey": job.source.key,
        "status": job.state.value,
        "stopping": job.stopping is not None,
        "database": job.database,
        "collection": job.options.collection,
        "format": (job.plan.format if job.plan else job.options.format).value,
        "validate": job.options.validate,
        "priority": job.options.priority,
        "runAt": moment(job.options.run_at),
        "batchId": job.batch,
        "createdAt": moment(job.created_at),
        "startedAt": moment(job.started_at),
        "finishedAt": moment(job.finished_at),
        "error": {"code": failure.code, "message": failure.message} if failure else None,
        "errors": cast("list[RejectBody]", list(job.errors)),
        "alreadyLoadedBy": job.already_loaded_by,
        "progress": {
            "bytesTotal": size,
            "bytesDone": done,
            "rangesTotal": progress.ranges_total,
            "rangesDone": progress.ranges_done,
            "lines": tally.lines,
            "inserted": tally.inserted,
            "duplicates": tally.duplicates,
            "rejected": tally.rejected,
            "blank": tally.blank,
            "percent": round(100 * done / size, 1) if size else (100.0 if job.state in TERMINAL else 0.0),
            "recordsPerSecond": round(rate, 1),
            "secondsLeft": left,
        },
    }


def _stalls(job: Job) -> bool:
    """Whether a job has moved so little lately that an estimate of the time left would mean nothing."""
    progress = job.progress
    if progress.at is None or job.started_at is None:
        return False
    worked = (progress.at - job.started_at).total_seconds() - job.idle_seconds
    return progress.rate * worked < progress.tally.lines / STALLED


def is_idle(job: Job, ranges: RangeReport) -> bool:
    """Whether a job has not ended, and no worker is at work on it."""
    return job.state not in TERMINAL and not ranges.kept


def waiting_for(job: Job, ranges: RangeReport, *, paused: bool, workers: int) -> str | None:
    """What an idle job waits for, as a phrase to follow "waits for"; None if it needs no more than a moment.

    Args:
        job, ranges: the job, and the report on its ranges.
        paused: whether the queue is paused.
        workers: how many workers of the job's database are alive.
    """
    left = ranges.states.get(RangeState.READY, 0) + ranges.states.get(RangeState.LEASED, 0)
    # A job that only has to be closed is held up by neither its start time nor a pause: any worker does it.
    if job.stopping is not None or (job.state is JobState.PROCESSING and not left):
        return None if workers else NO_WORKER
    if job.options.run_at is not None and job.options.run_at > datetime.now(UTC):
        return f"its start time, {moment(job.options.run_at)}"
    if paused:
        return "the queue to be resumed: it is paused (`headrace resume`)"
    if not workers:
        return NO_WORKER
    last = job.timeline[-1].what if job.timeline and job.state is JobState.PENDING else ""
    why = last.removeprefix(PUT_OFF) if last.startswith(PUT_OFF) else ranges.put_off
    if why is not None:
        return f"another try; the last one failed: {why}"
    return "its turn"


def job_detail(job: Job, ranges: RangeReport, waits: str | None) -> JobDetail:
    """A job with its options, what it waits for, the state of its ranges, and its timeline."""
    return {
        **job_status(job),
        "maxErrors": job.options.max_errors,
        "ifLoaded": job.options.if_loaded,
        "force": job.options.force,
        "timeoutSeconds": job.options.timeout_seconds,
        "waitingFor": waits,
        "ranges": {state.value: count for state, count in ranges.states.items()},
        "attempts": ranges.failures,
        "deaths": ranges.deaths,
        "workers": list(ranges.holders),
        "timeline": [{"at": moment(event.at), "what": event.what} for event in job.timeline],
    }


def batch_status(batch: JobBatch) -> BatchStatus:
    """A batch: PROCESSING until every job has ended; then FAILED if any of them is, else CANCELLED if any is, else
    COMPLETED.

    It is also FAILED if some jobs were never created: its request died halfway, more than `WHOLE_WITHIN` ago.
    """
    states, tally = batch.states, batch.tally
    known = sum(states.values())
    ended = sum(states.get(state, 0) for state in TERMINAL)
    status = JobState.PROCESSING
    if known < batch.count and not batch.pruned:
        gone = ended == known and datetime.now(UTC) - batch.created_at > WHOLE_WITHIN
        status = JobState.FAILED if gone else JobState.PROCESSING
    elif ended == known:
        worst = (JobState.FAILED, JobState.CANCELLED)
        status = next((state for state in worst if states.get(state)), JobState.COMPLETED)
    return {
        "batchId": batch.id,
        "status": status.value,
        "createdAt": moment(batch.created_at),
        "jobs": batch.count,
        "states": {state.value: states.get(state, 0) for state in JobState},
        "bytesTotal": batch.size,
        "lines": tally.lines,
        "inserted": tally.inserted,
        "duplicates": tally.duplicates,
        "rejected": tally.rejected,
        "blank": tally.blank,
    }


def moment(at: datetime | None) -> str | None:
    """A time as clients see it: UTC, to the millisecond."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z") if at else None
