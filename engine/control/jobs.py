"""How a job is stored in MongoDB: converts domain types to the fields of its document, and back. No I/O."""

from dataclasses import asdict, dataclass
from typing import Final

from bson import Binary

from engine.control.store import Document, literals
from engine.errors import Conflict
from engine.model import (
    Event,
    Failure,
    Format,
    Job,
    JobOptions,
    JobState,
    Plan,
    Progress,
    Source,
    Stop,
    Tally,
)

__all__ = [
    "LOADED",
    "PUT_OFF",
    "Ticket",
    "failure_document",
    "from_now",
    "happened",
    "job_of",
    "job_or_conflict",
    "job_or_none",
    "new_job",
    "planned",
    "progress_document",
    "put_off",
    "same_source",
]

# Matches jobs that have read their whole object and written its documents.
LOADED: Final[Document] = {"state": JobState.COMPLETED, "options.validate": {"$ne": True}, "unread": None}

PUT_OFF: Final = "put off: "
"""Prefix of the timeline event that says why a job could not be planned."""

MAX_TIMELINE_EVENTS: Final = 100
"""Timeline events that a job keeps, the latest ones."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What makes a request safe to repeat: the client's key, and a digest of the whole request."""

    key: str
    digest: str


def new_job(source: Source, options: JobOptions, database: str, more: Document) -> Document:
    """The fields of a new job, for the `$set` stage of an update pipeline."""
    document: Document = {
        "database": database,
        "source": asdict(source),
        "options": {
            "collection": options.collection,
            "format": options.format,
            "maxErrors": options.max_errors,
            "priority": options.priority,
            "force": options.force,
            "ifLoaded": options.if_loaded,
            "validate": options.validate,
            "timeoutSeconds": options.timeout_seconds,
            "runAt": options.run_at,
        },
        "state": JobState.PENDING,
        "open": True,
        "attempts": 0,
        "round": 0,
    } | more
    return {"createdAt": "$$NOW"} | literals(document) | put_off({"$literal": options.run_at}) | happened("submitted")


def same_source(source: Source) -> Document:
    """Matches documents whose source is this very version of an object."""
    return {f"source.{name}": value for name, value in asdict(source).items()}


def happened(what: str) -> Document:
    """Fields to set: the timeline of a job with this event appended."""
    event = {"at": "$$NOW", "what": {"$literal": what}}
    known = {"$ifNull": ["$timeline", []]}
    return {"timeline": {"$slice": [{"$concatArrays": [known, [event]]}, -MAX_TIMELINE_EVENTS]}}


def put_off(until: object) -> Document:
    """Fields to set so that a job does not begin before `until`, an expression that may be null. While a job is
    `waiting`, workers that look at the queue do not read it."""
    waits = {"$gt": [until, "$$NOW"]}
    return {"notBefore": {"$ifNull": [until, "$$REMOVE"]}, "waiting": {"$cond": [waits, True, "$$REMOVE"]}}


def from_now(seconds: int) -> Document:
    """The server's time plus `seconds`, as an expression."""
    return {"$add": ["$$NOW", seconds * 1000]}


def planned(plan: Plan, state: JobState, already_loaded_by: str | None) -> Document:
    """Fields to set when a job is planned: its plan and the state that it moves to."""
    fixed: Document = {
        "format": plan.format,
        "tag": Binary(plan.tag),
        "rangeBytes": plan.range_bytes,
        "rangeCount": plan.range_count,
        "sole": plan.sole,
        "maxLineBytes": plan.max_line_bytes,
    }
    return {
        "state": state,
        "notBefore": "$$REMOVE",
        "waiting": "$$REMOVE",
        "plan": {"$literal": fixed},
        "alreadyLoadedBy": {"$literal": already_loaded_by},
        "startedAt": {"$ifNull": ["$startedAt", "$$NOW"]},
    }


def progress_document(progress: Progress) -> Document:
    """A job's progress as stored in the job, stamped with the server's time."""
    return {
        "tally": {"$literal": progress.tally.document()},
        "rangesTotal": progress.ranges_total,
        "rangesDone": progress.ranges_done,
        "rate": progress.rate,
        "at": "$$NOW",
    }


def failure_document(failure: Failure | None) -> Document | None:
    """A failure as stored; None for None."""
    return None if failure is None else asdict(failure)


def failure_of(document: Document | None) -> Failure | None:
    """The failure that a stored document holds; None for None."""
    return None if document is None else Failure(**document)


def _plan_of(found: Document) -> Plan:
    return Plan(
        format=Format(found["format"]),
        tag=bytes(found["tag"]),
        range_bytes=found["rangeBytes"],
        range_count=found["rangeCount"],
        sole=found["sole"],
        max_line_bytes=found["maxLineBytes"],
    )


def job_or_none(found: Document) -> Job | None:
    """The job in a document of `jobs`; None if a later version wrote it and this one cannot read it."""
    try:
        return job_of(found)
    except (KeyError, TypeError, ValueError):
        return None


def job_or_conflict(found: Document) -> Job:
    """The job in a document of `jobs`. Raises Conflict if a later version wrote it and this one cannot read it."""
    if (job := job_or_none(found)) is None:
        raise Conflict(f"job {found['_id']} was made by a later version of Headrace: upgrade this one to read it")
    return job


def job_of(found: Document) -> Job:
    """The job in a document of `jobs`. Raises KeyError, TypeError or ValueError if this version cannot read it."""
    options = found["options"]
    plan, stopping, progress = found.get("plan"), found.get("stopping"), found.get("progress", {})
    tally = Tally.from_document(progress.get("tally", {}))
    loaded_by, planner = found.get("alreadyLoadedBy"), found.get("planner", {})
    return Job(
        id=str(found["_id"]),
        database=found["database"],
        source=Source(**found["source"]),
        options=JobOptions(
            collection=options["collection"],
            format=Format(options["format"]),
            max_errors=options["maxErrors"],
            priority=int(options["priority"]),
            force=options["force"],
            if_loaded=options["ifLoaded"],
            validate=options.get("validate", False),
            timeout_seconds=options.get("timeoutSeconds"),
            run_at=options.get("runAt"),
        ),
        state=JobState(found["state"]),
        created_at=found["createdAt"],
        started_at=found.get("startedAt"),
        finished_at=found.get("finishedAt"),
        plan=plan and _plan_of(plan),
        stopping=stopping and Stop(JobState(stopping["to"]), failure_of(stopping["failure"])),
        failure=failure_of(found.get("failure")),
        progress=Progress(
            tally,
            progress.get("rangesTotal", plan["rangeCount"] if plan else 0),
            progress.get("rangesDone", 0),
            progress.get("rate", 0.0),
            progress.get("at"),
        ),
        already_loaded_by=str(loaded_by) if loaded_by else None,
        attempts=found["attempts"],
        round=found["round"],
        idle_seconds=found.get("idleMilliseconds", 0) / 1000,
        batch=str(found["batch"]) if "batch" in found else None,
        planner_deaths=planner.get("deaths", 0) + planner.get("lapses", 0),
        errors=tuple(found.get("errors", ())),
        timeline=tuple(Event(event["at"], event["what"]) for event in found.get("timeline", ())),
    )
