"""What goes over the wire: the bodies of answers, which are described by these; the type checker holds the code to them."""

from typing import Any, NotRequired

from typing_extensions import TypedDict

__all__ = [
    "BatchAnswer",
    "BatchStatus",
    "DirectUpload",
    "FileDetail",
    "FilePage",
    "Health",
    "JobDetail",
    "JobPage",
    "JobStatus",
    "ProblemBody",
    "ProcessAnswer",
    "QueueState",
    "RejectBody",
    "RejectPage",
    "UploadAnswer",
    "WorkerBody",
    "WorkerPage",
]


class ProblemBody(TypedDict):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    requestId: str
    errors: NotRequired[list[dict[str, str]]]


class Failed(TypedDict):
    """Why a job failed: a stable code and a sentence."""

    code: str
    message: str


class RejectBody(TypedDict):
    """A line that did not become a document. `raw` is base64 where `encoding` says so."""

    line: int | None
    offset: int
    length: int
    reason: str
    detail: str
    raw: str
    encoding: NotRequired[str]
    rawLength: NotRequired[int]
    code: NotRequired[int]


class ProgressBody(TypedDict):
    """How far a job is. inserted + duplicates + rejected + blank = lines."""

    bytesTotal: int
    bytesDone: int
    rangesTotal: int
    rangesDone: int
    lines: int
    inserted: int
    duplicates: int
    rejected: int
    blank: int
    percent: float
    recordsPerSecond: float
    secondsLeft: float | None


class JobStatus(TypedDict):
    """A job."""

    jobId: str
    fileKey: str
    status: str
    stopping: bool
    collection: str
    format: str
    validate: bool
    priority: int
    runAt: str | None
    batchId: str | None
    createdAt: str | None
    startedAt: str | None
    finishedAt: str | None
    error: Failed | None
    errors: list[RejectBody]
    alreadyLoadedBy: str | None
    progress: ProgressBody


class EventBody(TypedDict):
    """Something that happened to a job."""

    at: str | None
    what: str


class JobDetail(JobStatus):
    """A job, with what became of its ranges and what happened to it."""

    ranges: dict[str, int]
    attempts: int
    deaths: int
    workers: list[str]
    timeline: list[EventBody]


class JobPage(TypedDict):
    """Jobs, newest first; `next` is the cursor of the next page."""

    jobs: list[JobStatus]
    next: str | None


class RejectPage(TypedDict):
    """Rejects in the order of the file."""

    jobId: str
    rejects: list[RejectBody]
    next: str | None


class ProcessAnswer(TypedDict):
    """A job was made."""

    message: str
    jobId: str
    status: str


class BatchAnswer(TypedDict):
    """A batch of jobs was made."""

    message: str
    batchId: str
    jobs: int


class BatchStatus(TypedDict):
    """A batch: its jobs by state, and their progress summed. `status` is PROCESSING until all have ended."""

    batchId: str
    status: str
    createdAt: str | None
    jobs: int
    states: dict[str, int]
    bytesTotal: int
    lines: int
    inserted: int
    duplicates: int
    rejected: int
    blank: int


class UploadAnswer(TypedDict):
    """A file was stored."""

    message: str
    fileKey: str
    size: int
    etag: str


class SignedPart(TypedDict):
    """Where to PUT a part."""

    partNumber: int
    url: str


class StoredPart(TypedDict):
    """A part that S3 has."""

    partNumber: int
    size: int
    etag: str


class DirectUpload(TypedDict):
    """An upload under way: PUT each part to its URL with these headers, then complete it."""

    uploadId: str
    fileKey: str
    size: int | None
    partBytes: int
    parts: int
    headers: dict[str, str]
    urls: list[SignedPart]
    stored: list[StoredPart]


class FileBody(TypedDict):
    """An object in the bucket."""

    fileKey: str
    size: int
    etag: str
    modifiedAt: str | None


class FilePage(TypedDict):
    """Objects by key."""

    bucket: str
    files: list[FileBody]
    next: str | None


class FileDetail(TypedDict):
    """An object and its latest jobs."""

    fileKey: str
    size: int
    etag: str
    jobs: list[JobStatus]


class QueueState(TypedDict):
    """The queue: whether it is paused, and its jobs by state."""

    paused: bool
    jobs: dict[str, int]
    oldestSeconds: float


class WorkerBody(TypedDict):
    """A worker that is alive: what it does now, its rate in lines a second, memory in bytes, and all that it counted."""

    name: str
    host: str
    slot: int
    pid: int
    doing: dict[str, Any]
    rate: float
    memory: int
    memoryPeak: int
    counts: dict[str, float]


class WorkerPage(TypedDict):
    """The workers that are alive, of all engines."""

    workers: list[WorkerBody]


Health = dict[str, str]
