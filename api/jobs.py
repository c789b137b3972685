"""Jobs over HTTP: submit, status, cancel, retry, rejects."""

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import falcon
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, TypeAdapter
from pydantic.alias_generators import to_camel

from api.problems import Problem
from engine.model import TERMINAL, Format, Job, JobOptions, JobState
from engine.objects import Objects
from engine.queue import Queue
from engine.rejects import Rejects

__all__ = ["Cancel", "Process", "RejectLines", "Retry", "Status", "told"]

BODY_MOST_BYTES: Final = 64 * 1024
PAGE: Final = 100
PAGE_MOST: Final = 1000
FIRST_ERRORS: Final = 5


def _budget(value: object) -> object:
    """A count, or a percentage such as "2%"."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('write a count such as 1000, or a percentage such as "2%"')
    if isinstance(value, int):
        if not 0 <= value < 2**63:
            raise ValueError("a count is not negative, and below 2^63")
        return value
    number = value.removesuffix("%")
    if not value.endswith("%") or not number.replace(".", "", 1).isascii() or not number.replace(".", "", 1).isdigit():
        raise ValueError('write a percentage as "2%" or "0.5%"')
    if not 0 <= float(number) <= 100:
        raise ValueError("a percentage is from 0% to 100%")
    return value


class ProcessRequest(BaseModel):
    """The body of POST /process/{fileKey}; every field may be left out."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, strict=True)

    collection: Annotated[str, Field(min_length=1, max_length=200)] = "records"
    format: Literal["auto", "ndjson", "text"] = "auto"
    max_errors: Annotated[int | str, BeforeValidator(_budget)] = 1000
    priority: Annotated[StrictInt, Field(ge=-1000, le=1000)] = 0
    force: StrictBool = False
    if_loaded: Literal["load", "skip"] = "load"

    def options(self) -> JobOptions:
        """As the engine takes them."""
        return JobOptions(
            self.collection, Format(self.format), self.max_errors, self.priority, self.force, self.if_loaded
        )


class Process:
    """POST /process/{fileKey}."""

    def __init__(self, queue: Queue, objects: Objects) -> None:
        self._queue = queue
        self._objects = objects

    def on_post(self, req: falcon.Request, resp: falcon.Response, file_key: str) -> None:
        """202 with the job's id, whatever the size of the object."""
        request = ProcessRequest.model_validate(_body(req))
        if not file_key or len(file_key.encode("utf-8", "surrogatepass")) > 1024 or not file_key.isprintable():
            raise Problem(404, "not_found", "a file's key has 1 to 1024 bytes of printable UTF-8")
        job = self._queue.submit(self._objects.head(file_key), request.options())
        resp.status = 202
        resp.location = f"/status/{job.id}"
        resp.media = {"message": "Job created successfully", "jobId": job.id, "status": job.state.value}


class Status:
    """GET /status/{jobId}."""

    def __init__(self, queue: Queue, rejects: Rejects) -> None:
        self._queue = queue
        self._rejects = rejects

    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """200 with everything about the job."""
        job = self._queue.get(job_id)
        # Most jobs have none: then the collection of rejects is not asked.
        errors = self._rejects.page(job.id, FIRST_ERRORS) if job.progress.tally.rejected else []
        resp.media = told(job, errors)
        resp.cache_control = ["no-store"]


class Cancel:
    """POST /jobs/{jobId}/cancel."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def on_post(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """202 with the job as it is now: CANCELLED, or on the way there."""
        resp.status = 202
        resp.media = told(self._queue.cancel(job_id), [])


class Retry:
    """POST /jobs/{jobId}/retry."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def on_post(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """202 with the job as it is now: its ranges that are not done are worked on again."""
        resp.status = 202
        resp.media = told(self._queue.retry(job_id), [])


class RejectLines:
    """GET /jobs/{jobId}/rejects: a page of rejects, or all of their raw lines."""

    def __init__(self, queue: Queue, rejects: Rejects) -> None:
        self._queue = queue
        self._rejects = rejects

    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """200 with `rejects` and `next`; with `format=ndjson`, the raw lines to mend and load again."""
        job = self._queue.get(job_id)
        form = req.get_param("format", default="json")
        if form == "ndjson" or (form == "json" and "application/x-ndjson" in req.accept):
            resp.content_type = "application/x-ndjson"
            resp.downloadable_as = f"{job.id}-rejects.ndjson"
            resp.stream = self._lines(job.id)
            return
        if form != "json":
            raise Problem(422, "invalid_request", 'format: write "json" or "ndjson"')
        limit = TypeAdapter(Annotated[int, Field(ge=1, le=PAGE_MOST)])
        try:
            most = limit.validate_python(req.get_param("limit", default=str(PAGE)))
        except ValueError:
            raise Problem(422, "invalid_request", f"limit: write a whole number from 1 to {PAGE_MOST}") from None
        page = self._rejects.page(job.id, most, _offset(req.get_param("cursor")))
        more = len(page) == most
        resp.media = {"jobId": job.id, "rejects": page, "next": _cursor(page[-1]["offset"]) if more else None}

    def _lines(self, job_id: str) -> Iterator[bytes]:
        for _, line in self._rejects.lines(job_id):
            yield line + b"\n"


def told(job: Job, errors: list[dict[str, Any]]) -> dict[str, Any]:
    """A job as clients see it."""
    progress, tally, size = job.progress, job.progress.tally, job.source.size
    done = size if job.state is JobState.COMPLETED else min(progress.bytes_done, size)
    rate = progress.rate
    if job.state in TERMINAL and job.started_at and job.finished_at:
        rate = tally.lines / max((job.finished_at - job.started_at).total_seconds(), 0.001)
    left: float | None = None
    if job.state in TERMINAL:
        left = 0.0
    elif rate > 0 and tally.lines:
        left = round((size - done) / (rate * tally.bytes / tally.lines), 1)
    failure = job.failure or (job.stopping.failure if job.stopping else None)
    return {
        "jobId": job.id,
        "fileKey": job.source.key,
        "status": job.state.value,
        "stopping": job.stopping is not None,
        "collection": job.options.collection,
        "format": (job.plan.format if job.plan else job.options.format).value,
        "createdAt": _time(job.created_at),
        "startedAt": _time(job.started_at),
        "finishedAt": _time(job.finished_at),
        "error": {"code": failure.code, "message": failure.message} if failure else None,
        "errors": errors,
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


def _time(at: datetime | None) -> str | None:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z") if at else None


def _body(req: falcon.Request) -> object:
    """The request's JSON, {} where there is none."""
    raw = req.bounded_stream.read(BODY_MOST_BYTES + 1)
    if len(raw) > BODY_MOST_BYTES:
        raise Problem(413, "too_large", f"the body of this call has at most {BODY_MOST_BYTES} bytes")
    if not raw.strip():
        return {}
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Problem(400, "bad_json", f"the body is not JSON: {error}") from None


def _cursor(offset: int) -> str:
    return base64.urlsafe_b64encode(str(offset).encode()).decode().rstrip("=")


def _offset(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    try:
        offset = int(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if 0 <= offset < 2**63:
            return offset
    except ValueError:
        pass
    raise Problem(422, "invalid_request", "cursor: take it from `next` of the page before")
