"""Types of the response bodies: OpenAPI describes them, and the type checker holds the code to them."""

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from engine.model import Format, JobState, Reason

__all__ = [
    "BatchAnswer",
    "BatchStatus",
    "DirectUpload",
    "FileDetail",
    "FilePage",
    "HealthBody",
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


_State = Annotated[str, Field(json_schema_extra={"enum": [str(state) for state in JobState]})]
_Format = Annotated[str, Field(json_schema_extra={"enum": [str(format) for format in Format]})]
_Reason = Annotated[str, Field(json_schema_extra={"enum": [str(reason) for reason in Reason]})]
_Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class ProblemBody(TypedDict):
    """An error, in the format of RFC 9457."""

    type: Annotated[str, Field(description="Stable: match on it")]
    title: Annotated[str, Field(description="The name of the status")]
    status: Annotated[int, Field(description="The status of the response")]
    detail: Annotated[str, Field(description="What happened, and what to do next")]
    requestId: Annotated[str, Field(description="Also in X-Request-ID and in the log")]
    errors: NotRequired[Annotated[list[dict[str, str]], Field(description="Each `field` that is wrong, and why")]]
    checks: NotRequired[Annotated[dict[str, str], Field(description="/readyz only: state of each server")]]


class Failed(TypedDict):
    """Why a job failed."""

    code: Annotated[
        str,
        Field(
            description="Stable: access_denied, failed, final, object_changed, object_gone, refused, timeout, too_many_errors, "
            "unavailable, unexpected, workers_died"
        ),
    ]
    message: Annotated[str, Field(description="What happened, and what to do next")]


class RejectBody(TypedDict):
    """A line that did not become a document. `raw` is base64 where `encoding` says so."""

    line: Annotated[int | None, Field(description="Its number in the file, from 1; null while unknown")]
    offset: Annotated[int, Field(description="Offset of its first byte in the file")]
    length: Annotated[int, Field(description="Bytes, without the line end")]
    reason: Annotated[_Reason, Field(description="Stable: match on it")]
    detail: Annotated[str, Field(description="What is wrong with it")]
    raw: Annotated[str, Field(description="The line itself, or its beginning")]
    encoding: NotRequired[Annotated[str, Field(description="base64 if `raw` is, because the line is not UTF-8")]]
    rawLength: NotRequired[Annotated[int, Field(description="Bytes of the whole line, if `raw` is cut short")]]
    code: NotRequired[Annotated[int, Field(description="MongoDB's error code, if it refused the document")]]


class ProgressBody(TypedDict):
    """A job's progress. inserted + duplicates + rejected + blank = lines."""

    bytesTotal: Annotated[int, Field(description="Size of the object")]
    bytesDone: Annotated[int, Field(description="Bytes whose lines are done")]
    rangesTotal: Annotated[int, Field(description="Ranges that the object is cut into; 0 until it is planned")]
    rangesDone: Annotated[int, Field(description="Ranges that are done")]
    lines: Annotated[int, Field(description="Lines that are done")]
    inserted: Annotated[
        int,
        Field(description="Lines that became documents; one with its own `_id` may have been there before"),
    ]
    duplicates: Annotated[int, Field(description="Lines whose documents already existed")]
    rejected: Annotated[int, Field(description="Lines that did not become documents")]
    blank: Annotated[int, Field(description="Lines of white space")]
    percent: Annotated[float, Field(description="Share of the bytes that are done")]
    recordsPerSecond: Annotated[float, Field(description="Recent rate; once the job has ended, its average")]
    secondsLeft: Annotated[float | None, Field(description="An estimate; null until there is one")]


class JobStatus(TypedDict):
    """A job."""

    jobId: Annotated[str, Field(description="24 hexadecimal digits")]
    fileKey: Annotated[str, Field(description="Key of the object that is loaded")]
    status: Annotated[
        _State, Field(description="COMPLETED, FAILED and CANCELLED are final; a retry reopens the last two")
    ]
    stopping: Annotated[bool, Field(description="It will end as soon as its workers have released it")]
    database: Annotated[str, Field(description="Database of the collection")]
    collection: Annotated[str, Field(description="Where the documents go")]
    format: Annotated[_Format, Field(description="How lines become documents; auto until that is decided")]
    validate: Annotated[bool, Field(description="Nothing is written")]
    priority: Annotated[int, Field(description="Higher goes first")]
    runAt: Annotated[_Moment | None, Field(description="It does not start before this time")]
    batchId: Annotated[str | None, Field(description="Id of the batch, if it was submitted in one")]
    createdAt: Annotated[_Moment | None, Field(description="When it was submitted")]
    startedAt: Annotated[_Moment | None, Field(description="When the first worker joined it")]
    finishedAt: Annotated[_Moment | None, Field(description="When it ended")]
    error: Annotated[Failed | None, Field(description="Why it failed, or is about to")]
    errors: Annotated[
        list[RejectBody],
        Field(description="The first rejects, cut short; empty for tokens without the scope `read`"),
    ]
    alreadyLoadedBy: Annotated[
        str | None, Field(description="The earlier job that loaded this version of the object into this collection")
    ]
    progress: Annotated[ProgressBody, Field(description="How far it has come")]


class EventBody(TypedDict):
    """Something that happened to a job."""

    at: _Moment | None
    what: str


class JobDetail(JobStatus):
    """A job with its options, what it waits for, the state of its ranges, and its timeline."""

    maxErrors: Annotated[int | str, Field(description="Rejects allowed: a count, or a percentage")]
    ifLoaded: Annotated[str, Field(description="skip: it completes at once if this is already loaded")]
    force: Annotated[bool, Field(description="It loads a second copy")]
    timeoutSeconds: Annotated[int | None, Field(description="How long it may run")]
    waitingFor: Annotated[
        str | None,
        Field(description="If nobody works on it: a worker, its start time, the end of a pause, its turn, another try"),
    ]
    ranges: Annotated[dict[str, int], Field(description="Its ranges by state")]
    attempts: Annotated[int, Field(description="How often work on its ranges has failed")]
    deaths: Annotated[int, Field(description="How often a worker has died on one of them")]
    workers: Annotated[list[str], Field(description="Who has worked on it lately")]
    timeline: Annotated[list[EventBody], Field(description="What happened to it, oldest first")]


class JobPage(TypedDict):
    """Jobs, newest first; `next` is the cursor of the next page."""

    jobs: list[JobStatus]
    next: str | None


class RejectPage(TypedDict):
    """Rejects in file order; `next` is the cursor of the next page."""

    jobId: str
    rejects: list[RejectBody]
    next: str | None


class ProcessAnswer(TypedDict):
    """The job that was created."""

    message: str
    jobId: str
    status: _State


class BatchAnswer(TypedDict):
    """The batch of jobs that was created."""

    message: str
    batchId: str
    jobs: int


class BatchStatus(TypedDict):
    """A batch: its jobs by state, and their summed progress. `status` is PROCESSING until all of them have ended."""

    batchId: Annotated[str, Field(description="24 hexadecimal digits")]
    status: Annotated[_State, Field(description="Once all have ended: FAILED before CANCELLED before COMPLETED")]
    createdAt: Annotated[_Moment | None, Field(description="When it was submitted")]
    jobs: Annotated[int, Field(description="How many jobs it has")]
    states: Annotated[dict[str, int], Field(description="Its jobs by state")]
    bytesTotal: Annotated[int, Field(description="Bytes of all its objects")]
    lines: Annotated[int, Field(description="Lines done in all its jobs; the counts below likewise")]
    inserted: int
    duplicates: int
    rejected: int
    blank: int


class UploadAnswer(TypedDict):
    """The file that was stored."""

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

    uploadId: Annotated[str, Field(description="Its id in the other calls")]
    fileKey: Annotated[str, Field(description="Key that the object will have")]
    size: Annotated[int | None, Field(description="Bytes of the file, if known")]
    partBytes: Annotated[int, Field(description="Bytes of each part but the last, which may be shorter")]
    parts: Annotated[int, Field(description="How many there are; if the size is unknown, how many there may be")]
    headers: Annotated[dict[str, str], Field(description="To send with each part")]
    urls: Annotated[list[SignedPart], Field(description="Where to PUT parts; GET the upload for more")]
    stored: Annotated[list[StoredPart], Field(description="Parts that S3 has, which need not be sent again")]


class FileBody(TypedDict):
    """An object in the bucket."""

    fileKey: str
    size: int
    etag: str
    modifiedAt: _Moment | None


class FilePage(TypedDict):
    """Objects, sorted by key; `next` is the cursor of the next page."""

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
    """A live worker: what it is doing, its rate in lines per second, its memory in bytes, and its counters."""

    name: Annotated[str, Field(description="Unique among all workers, past ones included")]
    host: Annotated[str, Field(description="The machine that it runs on")]
    slot: Annotated[int, Field(description="Its number in its engine")]
    pid: Annotated[int, Field(description="Its process id")]
    doing: Annotated[dict[str, Any], Field(description="The job, the range and how far it is; empty when idle")]
    rate: Annotated[float, Field(description="Recent lines per second")]
    memory: Annotated[int, Field(description="Resident bytes")]
    memoryPeak: Annotated[int, Field(description="Peak resident bytes")]
    counts: Annotated[
        dict[str, float], Field(description="Lines, bytes, rejects and seconds by stage since it started")
    ]


class WorkerPage(TypedDict):
    """The live workers of all engines."""

    workers: list[WorkerBody]


HealthBody = dict[str, str]
