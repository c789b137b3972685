"""What goes over the wire: the requests, which are checked by these, and the answers, which are described by these."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator
from pydantic.alias_generators import to_camel
from typing_extensions import TypedDict

from engine.model import Format, JobOptions

__all__ = [
    "BatchAnswer",
    "BatchRequest",
    "BatchStatus",
    "DirectUpload",
    "FileDetail",
    "FileForm",
    "FilePage",
    "FilesQuery",
    "Health",
    "JobDetail",
    "JobPage",
    "JobStatus",
    "JobsQuery",
    "PartsQuery",
    "ProblemBody",
    "ProcessAnswer",
    "ProcessRequest",
    "QueueState",
    "RejectPage",
    "RejectsQuery",
    "UploadAnswer",
    "UploadBegin",
    "WorkerPage",
]

PAGE: Final = 100
PAGE_MOST: Final = 1000
KEYS_MOST: Final = 1000
JOB_ID: Final = r"^[0-9a-f]{24}$"

_COUNT_MOST: Final = 2**53 - 1


def _whole(value: object) -> object:
    """JSON has one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Priority = Annotated[int, Field(strict=True, ge=-1000, le=1000), BeforeValidator(_whole)]
_Seconds = Annotated[int, Field(strict=True, ge=1, le=31_536_000), BeforeValidator(_whole)]
_Size = Annotated[int, Field(strict=True, ge=0, le=5 * 1024**4), BeforeValidator(_whole)]
_PartSize = Annotated[int, Field(strict=True, ge=5 * 1024**2, le=5 * 1024**3), BeforeValidator(_whole)]


def _budget(value: object) -> object:
    """A count, or a percentage such as "2%"."""
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('write a count such as 1000, or a percentage such as "2%"')
    if isinstance(value, int):
        if not 0 <= value <= _COUNT_MOST:
            raise ValueError("a count is not negative, and below 2^53")
        return value
    number = value.removesuffix("%")
    if not value.endswith("%") or not number.replace(".", "", 1).isascii() or not number.replace(".", "", 1).isdigit():
        raise ValueError('write a percentage as "2%" or "0.5%"')
    if len(number) > 20 or not 0 <= float(number) <= 100:
        raise ValueError("a percentage is from 0% to 100%")
    return value


def _moment(value: object) -> object:
    """A time with its offset from UTC, as in 2026-11-24T09:00:00Z."""
    if value is None or isinstance(value, datetime):
        return value
    if not isinstance(value, str):
        raise ValueError("write a time such as 2026-11-24T09:00:00Z")
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("write a time such as 2026-11-24T09:00:00Z") from None
    if at.tzinfo is None:
        raise ValueError("say the offset from UTC, as in 2026-11-24T09:00:00Z")
    if not 1970 < at.year < 9999:
        raise ValueError("a year from 1971 to 9998 is expected")
    return at


_BUDGET_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": _COUNT_MOST},
        {"type": "string", "pattern": r"^(100|[0-9]{1,2}(\.[0-9]{1,6})?)%$"},
    ]
}
_MOMENT_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string", "format": "date-time", "pattern": r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]T"},
        {"type": "null"},
    ]
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, strict=True)


class ProcessRequest(_Request):
    """How an object is to be loaded; every field may be left out."""

    collection: Annotated[str, Field(min_length=1, max_length=200, description="Takes the documents")] = "records"
    format: Annotated[Literal["auto", "ndjson", "text"], Field(description="How a line becomes a document")] = "auto"
    max_errors: Annotated[
        int | str,
        BeforeValidator(_budget),
        Field(description="Rejects allowed: a count, or a percentage", json_schema_extra=_BUDGET_SCHEMA),
    ] = 1000
    priority: Annotated[_Priority, Field(description="Higher goes first")] = 0
    force: Annotated[StrictBool, Field(description="Load a second copy, with ids of its own")] = False
    if_loaded: Annotated[
        Literal["load", "skip"], Field(description="skip: complete at once what has been loaded before")
    ] = "load"
    # `validate` is a method of the models of old.
    dry_run: Annotated[
        StrictBool, Field(alias="validate", description="Read and judge everything, write no document")
    ] = False
    run_at: Annotated[
        datetime | None,
        BeforeValidator(_moment),
        Field(description="Not before this time", json_schema_extra=_MOMENT_SCHEMA),
    ] = None
    timeout_seconds: Annotated[_Seconds | None, Field(description="Fail when it runs for longer")] = None

    def options(self) -> JobOptions:
        """As the engine takes them."""
        return JobOptions(
            self.collection,
            Format(self.format),
            self.max_errors,
            self.priority,
            self.force,
            self.if_loaded,
            self.dry_run,
            self.timeout_seconds,
            self.run_at,
        )


class BatchRequest(ProcessRequest):
    """Many objects in one call: those whose keys begin with `prefix`, or those of `fileKeys`; and how to load each."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"type": kind}, other: {"type": "null"}}}
                for name, kind, other in (("prefix", "string", "fileKeys"), ("fileKeys", "array", "prefix"))
            ]
        }
    )

    prefix: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    file_keys: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]] | None, Field(min_length=1, max_length=KEYS_MOST)
    ] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "BatchRequest":
        if (self.prefix is None) == (self.file_keys is None):
            raise ValueError("name either prefix or fileKeys")
        return self


class UploadBegin(_Request):
    """A file whose parts the client will send to S3 itself."""

    file_name: Annotated[str, Field(min_length=1, max_length=1024)]
    size: Annotated[_Size | None, Field(description="Bytes, where they are known")] = None
    part_bytes: _PartSize | None = None


class FileForm(BaseModel):
    """A form with one file."""

    file: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)


Limit = Annotated[int, Field(ge=1, le=PAGE_MOST, description="The most to return")]


class JobsQuery(_Query):
    """Which jobs."""

    status: Literal["PENDING", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED"] | None = None
    file: Annotated[str | None, Field(min_length=1, max_length=1024, description="Only jobs of this key")] = None
    collection: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    batch: Annotated[str | None, Field(pattern=JOB_ID)] = None
    limit: Limit = PAGE
    cursor: Annotated[str | None, Field(pattern=JOB_ID, description="`next` of the page before")] = None


class RejectsQuery(_Query):
    """Which rejects, and how."""

    format: Literal["json", "ndjson"] = "json"
    limit: Limit = PAGE
    cursor: Annotated[str, Field(pattern=r"^[0-9]{1,18}$")] | None = None


class FilesQuery(_Query):
    """Which files."""

    prefix: Annotated[str, Field(max_length=1024)] = ""
    limit: Limit = PAGE
    cursor: Annotated[str | None, Field(min_length=1, max_length=2048)] = None


class PartsQuery(_Query):
    """Which signed URLs."""

    first: Annotated[int, Field(ge=1, le=10_000, description="Number of the first part")] = 1
    count: Annotated[int, Field(ge=0, le=1000)] = PAGE


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
