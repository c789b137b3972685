"""The domain types, and the state machines of jobs and ranges.

Nothing here does I/O, reads a clock or imports anything outside the standard library. Offsets and sizes are bytes,
offsets counted from the start of the object; times are aware datetimes in UTC, by the database server's clock.
"""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from operator import add
from typing import Any, Final

__all__ = [
    "JOB_MOVES",
    "RANGE_MOVES",
    "TERMINAL",
    "ByteRange",
    "Event",
    "Failure",
    "Format",
    "Freed",
    "Job",
    "JobOptions",
    "JobState",
    "Lease",
    "Plan",
    "Progress",
    "RangeState",
    "Reason",
    "Reject",
    "Source",
    "Stop",
    "Tally",
]


class JobState(StrEnum):
    """The state of a job. COMPLETED, FAILED and CANCELLED are terminal."""

    PENDING = "PENDING"  # submitted, not planned yet
    PROCESSING = "PROCESSING"  # its ranges are fixed; workers lease them
    COMPLETED = "COMPLETED"  # every range is DONE
    FAILED = "FAILED"  # stopped by a final error, or some ranges FAILED and the others are DONE
    CANCELLED = "CANCELLED"  # stopped by a person


class RangeState(StrEnum):
    """The state of a byte range. DONE is terminal; so is FAILED, until the job is retried."""

    READY = "READY"  # anyone may lease it once `notBefore` has passed
    LEASED = "LEASED"  # one holder owns it until `until`, by its token
    DONE = "DONE"  # every line of it is acknowledged
    FAILED = "FAILED"  # given up: no attempts left, or too many holders in a row died at one offset


JOB_MOVES: Final[Mapping[JobState, frozenset[JobState]]] = {
    JobState.PENDING: frozenset({JobState.PROCESSING, JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}),
    JobState.PROCESSING: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}),
    JobState.COMPLETED: frozenset(),
    # Only an explicit retry leaves these two: to PENDING if the job has no plan, else to PROCESSING.
    JobState.FAILED: frozenset({JobState.PENDING, JobState.PROCESSING}),
    JobState.CANCELLED: frozenset({JobState.PENDING, JobState.PROCESSING}),
}
"""The states that may follow each state of a job. Every change is one compare-and-set on the old state."""

RANGE_MOVES: Final[Mapping[RangeState, frozenset[RangeState]]] = {
    RangeState.READY: frozenset({RangeState.LEASED}),
    RangeState.LEASED: frozenset({RangeState.READY, RangeState.DONE, RangeState.FAILED}),
    RangeState.DONE: frozenset(),
    RangeState.FAILED: frozenset({RangeState.READY}),
}
"""The states that may follow each state of a range; only an explicit retry turns FAILED into READY."""

TERMINAL: Final = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})


class Format(StrEnum):
    """How a line becomes a document. AUTO is decided once, when the job is planned."""

    AUTO = "auto"
    NDJSON = "ndjson"
    TEXT = "text"


class Reason(StrEnum):
    """Why a line was rejected. The values are stable: clients match on them."""

    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    INT_RANGE = "int_range"
    BAD_KEY = "bad_key"
    BAD_ID = "bad_id"
    TOO_DEEP = "too_deep"
    TOO_LARGE = "too_large"
    INVALID_UTF8 = "invalid_utf8"
    DUPLICATE_KEY = "duplicate_key"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Source:
    """One version of one object in S3, pinned: every read of it carries `If-Match: etag`.

    `etag` keeps its quotes, as S3 sent it. `version` is the S3 version id, "" in an unversioned bucket.
    """

    bucket: str
    key: str
    etag: str
    version: str
    size: int


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` to `end` (exclusive) of an object. It owns the lines whose first byte lies in it."""

    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of lines. `inserted + duplicates + rejected + blank == lines`; `bytes` includes terminators."""

    lines: int = 0
    inserted: int = 0
    duplicates: int = 0
    rejected: int = 0
    blank: int = 0
    bytes: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*map(add, astuple(self), astuple(other)))

    @classmethod
    def from_document(cls, document: Mapping[str, int]) -> "Tally":
        """The tally stored in a document; a missing field is 0."""
        return cls(**{f.name: int(document.get(f.name, 0)) for f in fields(cls)})

    def document(self) -> dict[str, int]:
        """The tally as a plain dict."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on one range. Only the holder of `token` may renew, confirm, close or fail it.

    `number` counts the leases of this range, from 1: a later one always has a higher number. `confirmed` is the offset
    below which every line is acknowledged, and where work starts; `tally` has the counts up to there. `deaths` counts
    the holders in a row that died or vanished at this `confirmed`, `attempts` the transient failures in a row that cost
    an attempt. `resumed` says that the range may have been worked on before.
    """

    job_id: str
    range: ByteRange
    token: str
    number: int
    confirmed: int
    tally: Tally
    attempts: int = 0
    deaths: int = 0
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Freed:
    """A range that was taken from its holder, which died or did not renew its lease."""

    job_id: str
    index: int
    holder: str


@dataclass(frozen=True, slots=True)
class Reject:
    """A line that did not become a document.

    `offset` and `length` (bytes) are those of the line without its terminator; `ordinal` is its 0-based number within
    its range; `head` its first bytes, at most 64 KiB. `code` is the database server's error code, if there is one.
    """

    offset: int
    length: int
    ordinal: int
    reason: Reason
    detail: str
    head: bytes
    code: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What the first worker to join a job decided, once, for all workers.

    `tag` is the six bytes that every generated `_id` starts with. `sole` says that no other job has loaded this source
    into the collection in its present state, so that a duplicate of a generated `_id` can only be this job's own
    replay. A line of more than `max_line_bytes` is a reject, whatever the settings of the engine that reads it.
    """

    format: Format
    tag: bytes
    range_bytes: int
    range_count: int
    sole: bool
    max_line_bytes: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job or range failed: a stable `code`, and a `message` that says what happened and what to do next."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Stop:
    """How a job is to end: its final state, and why if that is FAILED. Stored in an open job (`stopping`), it makes the
    holders of the job's ranges release them."""

    to: JobState
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A job's numbers, last summed over its ranges at `at`; `rate` is a moving average in lines per second."""

    tally: Tally = field(default_factory=Tally)
    ranges_total: int = 0
    ranges_done: int = 0
    rate: float = 0.0
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What the client asks of a job.

    `max_errors` is the number of rejects tolerated, or a percentage of the lines read such as "2%". Higher `priority`
    goes first. `force` loads a second copy. `if_loaded` is "load" or "skip". `validate` makes it a dry run, which reads
    and checks everything and writes no document. `timeout_seconds` limits how long the job runs once it is planned, or
    retried; it starts no earlier than `run_at`.
    """

    collection: str = "records"
    format: Format = Format.AUTO
    max_errors: int | str = 1000
    priority: int = 0
    force: bool = False
    if_loaded: str = "load"
    validate: bool = False
    timeout_seconds: int | None = None
    run_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job, in a word or a short phrase."""

    at: datetime
    what: str


@dataclass(frozen=True, slots=True)
class Job:
    """One load of one source into one collection.

    `id` is 24 hexadecimal digits. `attempts` counts the failures to plan the job, `round` its retries, and
    `idle_seconds` the time it had been terminal before each of them, in total. `planner_deaths` counts the workers in a
    row that died or vanished while they planned it.

    `database` holds the collection: only engines whose `MONGO_URI` names it work on the job. `batch` is the id of the
    batch that it was submitted in, if any. `timeline` holds its latest hundred events, and `errors` its first five
    rejects as clients see them, with raw lines cut short; they are updated together with `progress`.
    """

    id: str
    database: str
    source: Source
    options: JobOptions
    state: JobState
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    plan: Plan | None = None
    stopping: Stop | None = None
    failure: Failure | None = None
    progress: Progress = field(default_factory=Progress)
    already_loaded_by: str | None = None
    attempts: int = 0
    round: int = 0
    idle_seconds: float = 0.0
    batch: str | None = None
    planner_deaths: int = 0
    timeline: tuple[Event, ...] = ()
    errors: tuple[Mapping[str, Any], ...] = ()
