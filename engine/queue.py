"""Jobs in MongoDB: submit, plan, stop, cancel, retry, settle.

Every change of a job's state is one compare-and-set on the state that it comes from. Looking for work is a read and
writes nothing. A job becomes terminal only when no range of it is leased.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from bson import Binary, ObjectId
from pymongo import ReturnDocument, WriteConcern
from pymongo.collection import Collection

from engine.errors import Conflict, NotFound, Refused
from engine.ledger import ATTEMPTS, Ledger
from engine.model import (
    TERMINAL,
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
from engine.ranges import cut
from engine.steps import Step, reach
from engine.store import ENDED_JOBS, OPEN_JOBS, Document, Store, job_key, translated

__all__ = ["Queue", "Stamps", "over_budget"]

PAGE_JOBS: Final = 16
"""Open jobs that a worker looks at together."""

ROLL_UP_MS: Final = 900
"""A job's numbers are summed anew when they are older than this, by whichever worker notices."""

BUDGET_LINES: Final = 10_000
"""An error budget in percent is judged from this many lines on, and at the end."""


PRUNE_JOBS: Final = 100
"""Jobs that one call prunes at most."""


@dataclass(frozen=True, slots=True)
class Stamps:
    """What the holder of a range needs to know of its job, once a second."""

    stopping: bool
    stale: bool


class Queue:
    """The jobs.

    Args:
        store: the databases.
        ledger: the ranges of these jobs.
    """

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._store = store
        self._jobs: Collection[Document] = store.jobs
        self._ledger = ledger

    def submit(self, source: Source, options: JobOptions) -> Job:
        """Put a job on the queue, PENDING.

        Raises:
            Refused: the collection cannot take documents.
        """
        self._check_collection(options.collection)
        document: Document = {
            "source": {
                "bucket": source.bucket,
                "key": source.key,
                "etag": source.etag,
                "version": source.version,
                "size": source.size,
            },
            "options": {
                "collection": options.collection,
                "format": options.format,
                "maxErrors": options.max_errors,
                "priority": options.priority,
                "force": options.force,
                "ifLoaded": options.if_loaded,
            },
            "state": JobState.PENDING,
            "open": True,
            "attempts": 0,
            "round": 0,
        }
        with translated("submitting a job"):
            # An update with a pipeline is what lets the server write its own time; upsert makes it an insert.
            created = self._jobs.find_one_and_update(
                {"_id": ObjectId()},
                [{"$set": {"createdAt": "$$NOW"} | {name: {"$literal": value} for name, value in document.items()}}],
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        assert created is not None  # an upsert returns what it made
        self.wake()
        return _job(created)

    def wake(self) -> None:
        """Make idle workers look at the queue now."""
        with translated("waking the workers"):
            self._store.wakeups.insert_one({})

    def get(self, job_id: str) -> Job:
        """The job. Raises NotFound."""
        with translated("reading a job"):
            found = self._jobs.find_one({"_id": job_key(job_id)})
        if found is None:
            raise NotFound(f"there is no job {job_id}: it was never submitted here, or its history has been pruned")
        return _job(found)

    def open_jobs(self) -> Iterator[list[Job]]:
        """Jobs that may have work, highest priority first, then oldest first, by pages."""
        query = {"open": True, "$expr": {"$lte": ["$notBefore", "$$NOW"]}}
        with translated("looking for jobs"):
            order = [("options.priority", -1), ("_id", 1)]
            cursor = self._jobs.find(query, batch_size=PAGE_JOBS).sort(order).hint(OPEN_JOBS)
            page: list[Job] = []
            with cursor:
                for found in cursor:
                    page.append(_job(found))
                    if len(page) == PAGE_JOBS:
                        yield page
                        page = []
            if page:
                yield page

    def fix_plan(self, job: Job, plan: Plan, already_loaded_by: str | None) -> tuple[Job, bool]:
        """Fix the plan of a job, PENDING → PROCESSING.

        Returns the job with the plan that holds, whoever made it, and whether it is this one.
        """
        changes = _planned(plan, JobState.PROCESSING, already_loaded_by)
        with translated("planning a job"):
            found = self._jobs.find_one_and_update(
                {"_id": job_key(job.id), "state": JobState.PENDING},
                [{"$set": changes}],
                return_document=ReturnDocument.AFTER,
            )
        return (self.get(job.id), False) if found is None else (_job(found), True)

    def open_ranges(self, job: Job) -> None:
        """Write the ranges of a plan down, those that are not there yet. Safe to repeat by anyone."""
        assert job.plan is not None
        of = job.plan.range_count
        reach(Step.PLANNED)
        self._ledger.open(job.id, [cut(job.source.size, of, index) for index in range(of)])
        reach(Step.OPENED)

    def look(self, job_id: str) -> Stamps:
        """What a holder must know: is the job being stopped, are its numbers old? One read."""
        epoch = datetime(1970, 1, 1)  # noqa: DTZ001 (BSON dates are UTC)
        stages: list[Document] = [
            {"$match": {"_id": job_key(job_id)}},
            {
                "$project": {
                    "stopping": 1,
                    "state": 1,
                    "stale": {"$lt": [{"$ifNull": ["$rolledAt", epoch]}, {"$subtract": ["$$NOW", ROLL_UP_MS]}]},
                }
            },
        ]
        with translated("reading the stamps of a job"):
            found = next(iter(self._jobs.aggregate(stages)), None)
        if found is None:
            return Stamps(stopping=True, stale=False)
        return Stamps(bool(found.get("stopping")) or found["state"] != JobState.PROCESSING, found["stale"])

    def roll_up(self, job_id: str) -> None:
        """Sum the job's ranges into its progress, unless another worker has just done so; judge its error budget."""
        key = job_key(job_id)
        fresh = {"$subtract": ["$$NOW", ROLL_UP_MS]}
        elected = {"_id": key, "state": JobState.PROCESSING, "$expr": {"$lt": ["$rolledAt", fresh]}}
        with translated("summing a job"):
            found = self._jobs.find_one_and_update(
                elected, [{"$set": {"rolledAt": "$$NOW"}}], return_document=ReturnDocument.AFTER
            )
        if found is None:
            return
        job = _job(found)
        if job.plan is None:
            return
        summary = self._ledger.sum(job_id)
        seconds = {"$divide": [{"$subtract": ["$$NOW", "$progress.at"]}, 1000]}
        lately = {
            "$divide": [{"$subtract": [summary.tally.lines, "$progress.tally.lines"]}, {"$max": [seconds, 0.001]}]
        }
        known = {"$gt": ["$progress.at", None]}
        blend = {"$avg": ["$progress.rate", {"$max": [lately, 0]}]}
        since_start = {"$divide": [{"$subtract": ["$$NOW", "$startedAt"]}, 1000]}
        first = {"$divide": [summary.tally.lines, {"$max": [since_start, 0.001]}]}
        progress = _progress(summary.tally, job.plan.range_count, summary.done) | {
            "rate": {"$cond": [known, blend, first]},
            "at": "$$NOW",
        }
        with translated("summing a job"):
            self._jobs.update_one({"_id": key, "state": JobState.PROCESSING}, [{"$set": {"progress": progress}}])
        if over_budget(job.options.max_errors, summary.tally, final=False):
            self.stop(job_id, Stop(JobState.FAILED, _budget_spent(job, summary.tally)))

    def stop(self, job_id: str, stop: Stop) -> None:
        """Stamp a job so that the holders of its ranges let go; the first stamp holds. Terminal jobs stay as they are."""
        stamp: Document = {"to": stop.to, "failure": _failure_document(stop.failure)}
        with translated("stopping a job"):
            self._jobs.update_one(
                {"_id": job_key(job_id), "open": True, "stopping": None}, [{"$set": {"stopping": {"$literal": stamp}}}]
            )
        self.settle(job_id)

    def postpone(self, job_id: str, failure: Failure) -> None:
        """A job that could not be planned waits n⁴ seconds; after the last attempt it fails."""
        with translated("putting a job off"):
            found = self._jobs.find_one_and_update(
                {"_id": job_key(job_id), "state": JobState.PENDING},
                [
                    {"$set": {"attempts": {"$add": ["$attempts", 1]}}},
                    {"$set": {"notBefore": {"$add": ["$$NOW", {"$multiply": [{"$pow": ["$attempts", 4]}, 1000]}]}}},
                ],
                return_document=ReturnDocument.AFTER,
            )
        if found is not None and found["attempts"] > ATTEMPTS:
            self.stop(job_id, Stop(JobState.FAILED, failure))

    def settle(self, job_id: str) -> Job:
        """Bring a job to its end where nothing holds it back any more; returns the job. Safe to repeat by anyone."""
        job = self.get(job_id)
        if job.state in TERMINAL or (job.stopping is None and job.plan is None):
            return job
        if job.plan is None:
            assert job.stopping is not None
            return self._end(job, job.stopping, None)
        summary = self._ledger.sum(job_id)
        complete = summary.done == job.plan.range_count
        if job.stopping is not None and not (complete and job.stopping.to is JobState.CANCELLED):
            return job if summary.leased else self._end(job, job.stopping, (summary.tally, summary.done))
        if summary.ranges < job.plan.range_count:
            self.open_ranges(job)  # whoever planned the job died over it
        if summary.done + summary.failed < job.plan.range_count:
            return job
        if not summary.failed:
            return self.finish(job, summary.tally)
        failure = summary.failures[0] if summary.failures else Failure("failed", "a range failed")
        if summary.failed > 1:
            failure = Failure(failure.code, f"{summary.failed} ranges failed; the first: {failure.message}")
        return self._end(job, Stop(JobState.FAILED, failure), (summary.tally, summary.done))

    def finish(self, job: Job, tally: Tally) -> Job:
        """Every range of the job is DONE and `tally` is their sum: it is COMPLETED, or over its budget and FAILED."""
        assert job.plan is not None
        reach(Step.FINISH)
        end = Stop(JobState.COMPLETED)
        if over_budget(job.options.max_errors, tally, final=True):
            end = Stop(JobState.FAILED, _budget_spent(job, tally))
        else:
            # Before the job says so, and not after: a death in between is made good by the next to settle.
            self._mark_loaded(job)
            reach(Step.LOADED)
        return self._end(job, end, (tally, job.plan.range_count))

    def complete_unread(self, job_id: str, plan: Plan, already_loaded_by: str | None) -> None:
        """PENDING → COMPLETED without reading: the object is empty, or loaded already and `ifLoaded` is "skip"."""
        changes = _planned(plan, JobState.COMPLETED, already_loaded_by)
        times = {"finishedAt": "$$NOW", "open": "$$REMOVE"}
        self._move(job_id, JobState.PENDING, changes | times)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once where no range of it is leased, else as soon as the holders let go. Safe to repeat.

        Raises:
            NotFound: no such job.
            Conflict: it has COMPLETED or FAILED.
        """
        job = self.get(job_id)
        if job.state in TERMINAL and job.state is not JobState.CANCELLED:
            raise Conflict(f"job {job_id} is {job.state} already: there is nothing to cancel")
        if job.state is not JobState.CANCELLED:
            self.stop(job_id, Stop(JobState.CANCELLED))
        return self.get(job_id)

    def retry(self, job_id: str) -> Job:
        """Work again on the ranges of a FAILED or CANCELLED job that are not DONE. Safe to repeat while it is open.

        Raises:
            NotFound: no such job.
            Conflict: it has COMPLETED.
        """
        job = self.get(job_id)
        if job.state is JobState.COMPLETED:
            raise Conflict(f"job {job_id} is COMPLETED: every range of it is done, there is nothing to retry")
        if job.state not in TERMINAL:
            if job.stopping is not None:
                raise Conflict(f"job {job_id} is still stopping: retry it when it is {job.stopping.to}")
            return job
        self._ledger.reopen(job_id)
        to = JobState.PENDING if job.plan is None else JobState.PROCESSING
        gone = ("stopping", "failure", "finishedAt", "notBefore")
        changes = {"state": to, "open": True, "attempts": 0, "round": job.round + 1}
        self._move(job_id, job.state, changes | dict.fromkeys(gone, "$$REMOVE"), {"round": job.round, "pruned": None})
        self.wake()
        return self.get(job_id)

    def prune(self, days: float) -> int:
        """Delete some of the jobs that ended so long ago, with their ranges and rejects; returns how many.

        What guards against loading a file twice (`sources`) stays. Safe to repeat, and to be killed within.
        """
        old = {"$subtract": ["$$NOW", int(days * 86_400_000)]}
        ended = {"state": {"$in": list(TERMINAL)}, "finishedAt": {"$ne": None}}
        query = ended | {"$expr": {"$or": ["$pruned", {"$lt": ["$finishedAt", old]}]}}
        count = 0
        with translated("pruning old jobs"):
            for found in list(self._jobs.find(query, {"_id": 1}).hint(ENDED_JOBS).limit(PRUNE_JOBS)):
                key = found["_id"]
                # From here on it cannot be retried: a job whose ranges are half gone must not come back.
                if self._jobs.update_one({"_id": key} | ended, {"$set": {"pruned": True}}).matched_count:
                    self._ledger.delete(str(key))
                    self._store.rejects.delete_many({"_id": {"$gte": {"job": key}, "$lt": {"job": key, "offset": ""}}})
                    count += self._jobs.delete_one({"_id": key, "pruned": True}).deleted_count
        return count

    def _end(self, job: Job, stop: Stop, numbers: tuple[Tally, int] | None) -> Job:
        changes: Document = {
            "state": stop.to,
            "open": "$$REMOVE",
            "stopping": "$$REMOVE",
            "finishedAt": "$$NOW",
            "failure": {"$literal": _failure_document(stop.failure)},
        }
        if numbers is not None and job.plan is not None:
            tally, done = numbers
            changes["progress"] = _progress(tally, job.plan.range_count, done) | {"rate": 0.0, "at": "$$NOW"}
        # A stamp that arrived since must not be overtaken by COMPLETED, nor the other way round.
        stamped = {"stopping": None} if job.stopping is None else {"stopping": {"$ne": None}}
        # A retry since begins another round, of which what was summed here says nothing.
        with translated("ending a job"):
            found = self._jobs.find_one_and_update(
                {"_id": job_key(job.id), "state": job.state, "round": job.round} | stamped,
                [{"$set": changes}],
                return_document=ReturnDocument.AFTER,
            )
        reach(Step.FINISHED)
        return self.get(job.id) if found is None else _job(found)

    def _move(self, job_id: str, state: JobState, changes: Document, also: Document | None = None) -> bool:
        """The compare-and-set under every change of state; False where somebody else was quicker."""
        query = {"_id": job_key(job_id), "state": state} | (also or {})
        with translated("changing the state of a job"):
            return self._jobs.update_one(query, [{"$set": changes}]).modified_count == 1

    def _mark_loaded(self, job: Job) -> None:
        assert job.plan is not None
        query = {"tag": Binary(job.plan.tag), "loads.collection": job.options.collection}
        with translated("recording a completed load"):
            # No majority is waited for here: the write that ends the job waits, and comes after this one in the oplog.
            sources = self._store.sources.with_options(write_concern=WriteConcern(1))
            sources.update_one(query, {"$set": {"loads.$.completedBy": job_key(job.id)}})

    def _check_collection(self, name: str) -> None:
        refusal = None
        if not name or name.startswith((".", "system.")) or name.endswith(".") or "$" in name or "\0" in name:
            refusal = "its name is not one that a collection of documents can have"
        elif len(f"{self._store.data.name}.{name}".encode()) > 255:
            refusal = "its name is longer than MongoDB takes"
        else:
            with translated("looking at the collection"):
                found: Any = next(iter(self._store.data.list_collections(filter={"name": name})), None)
            if found is not None and found["type"] != "collection":
                refusal = f"it is a {found['type']}"
            elif found is not None and found.get("options", {}).get("capped"):
                refusal = "it is capped"
        if refusal:
            raise Refused(f"collection {name[:120]!r} cannot take documents: {refusal}; name another one")


def over_budget(max_errors: int | str, tally: Tally, *, final: bool) -> bool:
    """Whether rejects exceed the budget: a count, or a percentage such as "2%" of the lines read.

    `final` false: the job is still running, and a percentage waits for its first 10,000 lines.
    """
    if isinstance(max_errors, int):
        return tally.rejected > max_errors
    if tally.lines < BUDGET_LINES and not final:
        return False
    return tally.rejected * 100 > float(max_errors.rstrip("%")) * tally.lines


def _budget_spent(job: Job, tally: Tally) -> Failure:
    return Failure(
        "too_many_errors",
        f"{tally.rejected} of {tally.lines} lines were rejected and maxErrors allows {job.options.max_errors}: "
        f"see the rejects, mend the file or raise maxErrors; what was written stays",
    )


def _planned(plan: Plan, state: JobState, already_loaded_by: str | None) -> Document:
    fixed: Document = {
        "format": plan.format,
        "tag": Binary(plan.tag),
        "rangeBytes": plan.range_bytes,
        "rangeCount": plan.range_count,
        "sole": plan.sole,
    }
    return {
        "state": state,
        "plan": {"$literal": fixed},
        "alreadyLoadedBy": {"$literal": already_loaded_by},
        "startedAt": {"$ifNull": ["$startedAt", "$$NOW"]},
    }


def _progress(tally: Tally, total: int, done: int) -> Document:
    return {"tally": {"$literal": tally.document()}, "rangesTotal": total, "rangesDone": done}


def _failure_document(failure: Failure | None) -> Document | None:
    return None if failure is None else {"code": failure.code, "message": failure.message}


def _failure(document: Document | None) -> Failure | None:
    return None if document is None else Failure(document["code"], document["message"])


def _job(found: Document) -> Job:
    source, options = found["source"], found["options"]
    plan, stopping, progress = found.get("plan"), found.get("stopping"), found.get("progress", {})
    tally = Tally.from_document(progress.get("tally", {}))
    loaded_by = found.get("alreadyLoadedBy")
    return Job(
        id=str(found["_id"]),
        source=Source(source["bucket"], source["key"], source["etag"], source["version"], source["size"]),
        options=JobOptions(
            options["collection"],
            Format(options["format"]),
            options["maxErrors"],
            options["priority"],
            options["force"],
            options["ifLoaded"],
        ),
        state=JobState(found["state"]),
        created_at=found["createdAt"],
        started_at=found.get("startedAt"),
        finished_at=found.get("finishedAt"),
        plan=plan
        and Plan(Format(plan["format"]), bytes(plan["tag"]), plan["rangeBytes"], plan["rangeCount"], plan["sole"]),
        stopping=stopping and Stop(JobState(stopping["to"]), _failure(stopping["failure"])),
        failure=_failure(found.get("failure")),
        progress=Progress(
            tally,
            tally.bytes,
            progress.get("rangesTotal", plan["rangeCount"] if plan else 0),
            progress.get("rangesDone", 0),
            progress.get("rate", 0.0),
            progress.get("at"),
        ),
        already_loaded_by=str(loaded_by) if loaded_by else None,
        round=found["round"],
    )
