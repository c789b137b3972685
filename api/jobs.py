"""Jobs over HTTP: status, lists, details, cancel, retry, rejects."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any, Final, cast

import falcon

from api.answers import JobDetail, JobPage, JobStatus, RejectBody, RejectPage
from api.limits import OpenJobsLimit, Slots
from api.models import JobsQuery, RejectsQuery
from api.operations import Answer, Scope, operation, query_of
from api.problems import Problem
from api.views import is_idle, job_detail, job_status, waiting_for
from api.watch import REQUEST_HEADERS, RESPONSE_HEADERS, Watch
from engine.control.history import History
from engine.control.queue import Queue
from engine.control.rejects import Rejects
from engine.control.stats import live, serving
from engine.control.store import Store
from engine.model import TERMINAL, Format, Job, JobState

__all__ = ["Cancel", "Detail", "Jobs", "RejectLines", "Retry", "Status"]

NDJSON: Final = "application/x-ndjson"


class Status:
    """GET /status/{jobId}."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @operation(
        summary="A job's state and progress",
        group="jobs",
        scope=Scope.READ,
        headers=REQUEST_HEADERS,
        answers={
            200: Answer("The job", JobStatus, headers=RESPONSE_HEADERS),
            304: Answer("It still matches If-None-Match", headers=RESPONSE_HEADERS),
        },
        errors=(404, 409, 429),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """200 with the job's state and progress; 304 if nothing has changed."""
        self._watch.answer(req, resp, job_id, lambda: self._watch.status(job_id))


class Detail:
    """GET /jobs/{jobId}."""

    def __init__(self, store: Store, queue: Queue, history: History, watch: Watch) -> None:
        self._store = store
        self._queue = queue
        self._history = history
        self._watch = watch

    @operation(
        summary="A job with its ranges, its workers and what happened to it",
        group="jobs",
        scope=Scope.READ,
        headers=REQUEST_HEADERS,
        answers={
            200: Answer("The job", JobDetail, headers=RESPONSE_HEADERS),
            304: Answer("It still matches If-None-Match", headers=RESPONSE_HEADERS),
        },
        errors=(404, 409, 429),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """200 with the job in detail; 304 if nothing has changed."""

        def look() -> tuple[dict[str, Any], bool]:
            job, ranges = self._queue.get(job_id), self._history.ranges(job_id)
            waits = None
            if is_idle(job, ranges):
                workers = serving(live(self._store), job.database)
                waits = waiting_for(job, ranges, paused=self._queue.paused(), workers=workers)
            return dict(job_detail(job, ranges, waits)), job.state in TERMINAL

        self._watch.answer(req, resp, job_id, look)


class Jobs:
    """GET /jobs."""

    def __init__(self, history: History) -> None:
        self._history = history

    @operation(
        summary="Jobs, newest first",
        group="jobs",
        scope=Scope.READ,
        query=JobsQuery,
        answers={200: Answer("A page of jobs", JobPage)},
        errors=(422,),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 with a page."""
        query = query_of(req, JobsQuery)
        state = JobState(query.status) if query.status else None
        # One job more than asked for shows whether there is a next page.
        page = self._history.page(
            query.limit + 1,
            before=query.cursor,
            state=state,
            key=query.file,
            collection=query.collection,
            batch=query.batch,
        )
        more, page = len(page) > query.limit, page[: query.limit]
        body: JobPage = {"jobs": [job_status(job) for job in page], "next": page[-1].id if more else None}
        resp.media = body


def _status_for(req: falcon.Request, job: Job) -> JobStatus:
    """A job's status; without its rejects, which hold raw lines, if the caller may not read."""
    status = job_status(job)
    return status if req.context.may(Scope.READ) else {**status, "errors": []}


class Cancel:
    """POST /jobs/{jobId}/cancel."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @operation(
        summary="Cancel a job; safe to repeat",
        group="jobs",
        scope=Scope.SUBMIT,
        answers={
            202: Answer(
                "It is CANCELLED, or about to be; COMPLETED, if its last lines were already being loaded", JobStatus
            )
        },
        errors=(404, 409),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """202 with the job as it is now."""
        resp.status = 202
        resp.media = _status_for(req, self._queue.cancel(job_id))


class Retry:
    """POST /jobs/{jobId}/retry."""

    def __init__(self, queue: Queue, open_jobs: OpenJobsLimit) -> None:
        self._queue = queue
        self._open_jobs = open_jobs

    @operation(
        summary="Rerun the ranges of a job that are not done; safe to repeat",
        group="jobs",
        scope=Scope.SUBMIT,
        answers={202: Answer("It is open again", JobStatus)},
        errors=(404, 409, 503),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """202 with the job as it is now."""
        reopens = self._queue.get(job_id).state in TERMINAL
        with self._open_jobs.let_in(1) if reopens else nullcontext():
            job = self._queue.retry(job_id)
        resp.status = 202
        resp.media = _status_for(req, job)


class RejectLines:
    """GET /jobs/{jobId}/rejects: a page of rejects, or all of their raw lines; `slots` bounds these downloads."""

    def __init__(self, queue: Queue, rejects: Rejects, slots: Slots) -> None:
        self._queue = queue
        self._rejects = rejects
        self._slots = slots

    @operation(
        summary="The lines that did not become documents",
        group="jobs",
        scope=Scope.READ,
        query=RejectsQuery,
        answers={
            200: Answer(
                "A page of rejects; with format=ndjson all raw lines, each up to its first 64 KiB",
                RejectPage,
                other_media=NDJSON,
                headers={"Content-Disposition": "With format=ndjson, a file name for them"},
            )
        },
        errors=(404, 409, 422, 429),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """200 with `rejects` and `next`; with `format=ndjson`, the raw lines to fix and load again."""
        query = query_of(req, RejectsQuery)
        job = self._queue.get(job_id)
        resp.append_header("Vary", "Accept")
        plain = "format" not in req.params and req.client_prefers((falcon.MEDIA_JSON, NDJSON)) == NDJSON
        if query.format == "ndjson" or plain:
            if paged := {"limit", "cursor"} & set(req.params):
                raise Problem(422, "invalid_request", f"{min(paged)}: leave it out, as ndjson has all lines at once")
            if req.method == "HEAD":
                raise falcon.HTTPMethodNotAllowed(["GET"])  # nobody would close the stream
            self._slots.take()
            stream = _Download(self._rejects.lines(job.id), self._slots)
            try:
                stream.begin()  # an error at the start can still be answered with a problem
            except BaseException:
                stream.close()
                raise
            resp.content_type = NDJSON
            # The extension makes a later load detect the same format.
            text = job.plan is not None and job.plan.format is Format.TEXT
            resp.downloadable_as = f"{job.id}-rejects.{'txt' if text else 'ndjson'}"
            resp.stream = stream
            return
        page, more = self._rejects.page(job.id, query.limit, int(query.cursor) if query.cursor else None)
        body: RejectPage = {
            "jobId": job.id,
            "rejects": cast("list[RejectBody]", page),
            "next": str(page[-1]["offset"]) if more else None,
        }
        resp.media = body


class _Download:
    """A stream of raw lines. The server calls `close` when all of them are sent, or the client has left."""

    def __init__(self, lines: Iterator[bytes], slots: Slots) -> None:
        self._lines = lines
        self._slots: Slots | None = slots

    def begin(self) -> None:
        """Read the first line."""
        if (first := next(self._lines, None)) is not None:
            self._lines = chain([first], self._lines)

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            yield line + b"\n"

    def close(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.give()
