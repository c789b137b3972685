"""Submitting jobs: one object, or many in one call."""

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import falcon

from api.answers import BatchAnswer, BatchStatus, ProcessAnswer
from api.limits import OpenJobsLimit
from api.models import BatchRequest, ProcessRequest
from api.operations import Answer, Scope, Wait, body_of, operation
from api.problems import Problem
from api.views import batch_status
from engine.control.job_batches import JobBatches
from engine.control.jobs import Ticket
from engine.control.queue import Queue
from engine.errors import NotFound
from engine.model import Source
from engine.s3.objects import Objects

__all__ = ["Batches", "Process", "ProcessMany", "checked_key"]

HEADS_AT_A_TIME: Final = 16
MAX_PREFIX_OBJECTS: Final = 10_000
"""Most objects whose keys may begin with the prefix of one batch."""

MAX_KEY_BYTES: Final = 1024
"""Longest key that S3 takes."""

KEY_HEADER: Final = "Makes the call safe to repeat: the same key with the same request gives the same answer"

_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,200}")


def checked_key(key: str) -> str:
    """The key, if an object can have it. Raises NotFound otherwise."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= MAX_KEY_BYTES or "\0" in key:
        raise NotFound(f"a file's key has 1 to {MAX_KEY_BYTES} bytes of UTF-8: GET /files lists the existing ones")
    return key


def _listed(index: int, key: str) -> str:
    """A checked key of `fileKeys`. Raises Problem, which names its index there."""
    try:
        return checked_key(key)
    except NotFound as error:
        raise Problem(422, "invalid_request", f"fileKeys.{index}: {error}") from None


def _ticket(req: falcon.Request, request: ProcessRequest, what: str, place: str) -> Ticket | None:
    """The ticket that makes this request safe to repeat, if the client sends an Idempotency-Key. Raises Problem.

    It is valid for this `place` only: APIs of other buckets or databases may share the queue.
    """
    key = req.get_header("Idempotency-Key")
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Problem(
            422, "invalid_request", "Idempotency-Key: write 1 to 200 printable ASCII characters without spaces"
        )
    caller = getattr(req.context, "caller", "")
    whole = f"{what}\n{request.model_dump_json(by_alias=True)}"
    return Ticket(
        f"{place}:{caller}:{what.split(maxsplit=1)[0]}:{key}",
        hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest(),
    )


class Process:
    """POST /process/{fileKey}; `place` names the bucket and the database, as `bucket:database`."""

    def __init__(self, queue: Queue, objects: Objects, open_jobs: OpenJobsLimit, place: str) -> None:
        self._queue = queue
        self._objects = objects
        self._open_jobs = open_jobs
        self._place = place

    @operation(
        waits_for_s3=Wait.BRIEF,
        summary="Submit a job for an object",
        group="jobs",
        scope=Scope.SUBMIT,
        body=ProcessRequest,
        headers={"Idempotency-Key": KEY_HEADER},
        answers={202: Answer("The job was created", ProcessAnswer, headers={"Location": "Path of its status"})},
        errors=(404, 409, 422, 503),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, file_key: str) -> None:
        """202 with the job's id, whatever the size of the object."""
        request = body_of(req, ProcessRequest)
        key = checked_key(file_key)
        ticket = _ticket(req, request, f"one {key}", self._place)
        job = self._queue.redeem(ticket) if ticket is not None else None
        if job is None:
            source = self._objects.head(key)
            with self._open_jobs.let_in(1):
                job = self._queue.submit(source, request.options(), ticket)
        resp.status = 202
        resp.location = f"/status/{job.id}"
        body: ProcessAnswer = {
            "message": "Job created successfully",
            "jobId": job.id,
            "status": job.state.value,
        }
        resp.media = body


class ProcessMany:
    """POST /process; `place` names the bucket and the database, as `bucket:database`."""

    def __init__(self, batches: JobBatches, objects: Objects, open_jobs: OpenJobsLimit, place: str) -> None:
        self._batches = batches
        self._objects = objects
        self._open_jobs = open_jobs
        self._place = place

    @operation(
        waits_for_s3=Wait.LONG,
        summary="Submit a job for each of many objects",
        group="jobs",
        scope=Scope.SUBMIT,
        body=BatchRequest,
        headers={"Idempotency-Key": KEY_HEADER},
        answers={202: Answer("The batch was created", BatchAnswer, headers={"Location": "Path of its status"})},
        errors=(404, 422, 503),
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """202 with the batch's id; no job is created if one of the objects does not exist."""
        request = body_of(req, BatchRequest)
        ticket = _ticket(req, request, "many", self._place)
        redeemed = self._batches.redeem(ticket) if ticket is not None else None
        batch, missing = redeemed or (None, self._asked(request))
        if batch is None or missing:
            sources = self._sources(missing)
            with self._open_jobs.let_in(len(sources)):
                batch = self._batches.submit(sources, request.options(), ticket)
        resp.status = 202
        resp.location = f"/batches/{batch.id}"
        body: BatchAnswer = {"message": "Batch created successfully", "batchId": batch.id, "jobs": batch.count}
        resp.media = body

    def _asked(self, request: BatchRequest) -> list[str]:
        if request.file_keys:
            return sorted({_listed(index, key) for index, key in enumerate(request.file_keys)})
        keys = sorted({checked_key(key) for key in self._keys(request.prefix or "")})
        if not keys:
            raise NotFound(f"no object's key begins with {request.prefix!r}: GET /files lists the existing ones")
        return keys

    def _keys(self, prefix: str) -> Iterator[str]:
        after: str | None = None
        count = 0
        while True:
            page, after = self._objects.page(prefix, after=after)
            count += len(page)
            if count > MAX_PREFIX_OBJECTS:
                raise Problem(
                    422,
                    "invalid_request",
                    f"prefix: more than {MAX_PREFIX_OBJECTS} objects begin with it: use a longer one",
                )
            yield from (found.key for found in page if found.size or not found.key.endswith("/"))
            if after is None:
                return

    def _sources(self, keys: list[str]) -> list[Source]:
        with ThreadPoolExecutor(min(HEADS_AT_A_TIME, len(keys)), thread_name_prefix="head") as pool:
            try:
                return list(pool.map(self._objects.head, keys))
            except NotFound as error:
                raise NotFound(f"{error}; no job was created") from None


class Batches:
    """GET /batches/{batchId}."""

    def __init__(self, batches: JobBatches) -> None:
        self._batches = batches

    @operation(
        summary="A batch of jobs, with totals",
        group="jobs",
        scope=Scope.READ,
        answers={200: Answer("The batch", BatchStatus)},
        errors=(404,),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, batch_id: str) -> None:
        """200 with the sums over its jobs."""
        resp.media = batch_status(self._batches.get(batch_id))
