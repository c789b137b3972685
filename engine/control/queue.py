"""Jobs in MongoDB: submit, find, stop, end, cancel, retry.

Every change of a job's state is one compare-and-set on the state that it comes from. Looking for work is a read and
writes nothing. A job becomes terminal only when no range of it is leased.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Final

from bson import ObjectId
from pymongo import ReturnDocument, UpdateOne
from pymongo.collection import Collection
from pymongo.errors import DuplicateKeyError

from engine.control.admission import check_collection, check_ticket
from engine.control.budget import overspent
from engine.control.jobs import (
    Ticket,
    failure_document,
    from_now,
    happened,
    job_of,
    job_or_conflict,
    new_job,
    progress_document,
    put_off,
)
from engine.control.ledger import Ledger
from engine.control.loads import Loads
from engine.control.openjobs import PAGE_JOBS, OpenJobs
from engine.control.rejects import Rejects
from engine.control.schema import DEADLINES, OPEN_JOBS, WAITING_JOBS
from engine.control.store import Document, Store, claims_of, delete_slices, job_key, translated, with_ticket, write_all
from engine.errors import Conflict, HeadraceError, NotFound, Refused
from engine.logs import get_logger
from engine.model import (
    TERMINAL,
    Failure,
    Job,
    JobOptions,
    JobState,
    Progress,
    Source,
    Stop,
    Tally,
)
from engine.steps import Step, reach
from engine.text.ranges import cut

__all__ = ["Queue"]

RELEASE_SECONDS: Final = 2.0
"""How long a worker that ends a dry run may take to release its claims: it has other work to do."""

PAUSED: Final = "paused"
"""Name of the switch that pauses the whole queue."""

log = get_logger()


class Queue:
    """The jobs.

    Args:
        store: the databases.
        ledger: the ranges of these jobs.

    `open_jobs` lists those that have not ended.
    """

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._store = store
        self._jobs: Collection[Document] = store.jobs
        self._ledger = ledger
        self._rejects = Rejects(store, ledger)
        self._loads = Loads(store, ledger)
        self._database = store.data.name
        self.open_jobs = OpenJobs(store)

    def submit(self, source: Source, options: JobOptions, ticket: Ticket | None = None) -> Job:
        """Put a job on the queue, PENDING; with a ticket that was used before, return the job that it made then.

        Raises:
            Refused: the collection cannot take documents.
            KeyReused: the ticket's key was used with another request.
            Conflict: a later version made the job of this ticket, and this one cannot read it.
        """
        check_collection(self._store.data, options.collection)
        with translated("submitting a job"):
            try:
                # An update with a pipeline is what lets the server write its own time; upsert makes it an insert.
                created = self._jobs.find_one_and_update(
                    {"_id": ObjectId()},
                    [{"$set": new_job(source, options, self._database, {"ticket": asdict(ticket)} if ticket else {})}],
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
            except DuplicateKeyError:
                # Of the fields with unique indexes, only the ticket's key can exist already.
                if ticket is None or (found := self.redeem(ticket)) is None:
                    raise
                return found
        assert created is not None  # an upsert returns what it made
        self._store.wake()
        return job_of(created)

    def redeem(self, ticket: Ticket) -> Job | None:
        """The job that was submitted with this ticket, if any. Raises KeyReused; Conflict as `submit` does."""
        with translated("looking up an idempotency key"):
            found = self._jobs.find_one(with_ticket(ticket.key))
        if found is None:
            return None
        check_ticket(found, ticket)
        return job_or_conflict(found)

    def depth(self, most: int) -> int:
        """How many jobs are open, counted no further than `most`, which must not be 0."""
        with translated("counting open jobs"):
            return self._jobs.count_documents({"open": True}, hint=OPEN_JOBS, limit=most)

    def pause(self) -> None:
        """Let no worker begin another range until `resume`; ranges under way are finished."""
        with translated("pausing the queue"):
            self._store.switches.update_one({"_id": PAUSED}, [{"$set": {"at": "$$NOW"}}], upsert=True)

    def resume(self) -> None:
        """Undo `pause`."""
        with translated("resuming the queue"):
            self._store.switches.delete_one({"_id": PAUSED})
        self._store.wake()

    def paused(self) -> bool:
        """Whether the queue is paused."""
        with translated("checking whether the queue is paused"):
            return self._store.switches.find_one({"_id": PAUSED}) is not None

    def get(self, job_id: str) -> Job:
        """The job. Raises NotFound; Conflict if a later version made it and this one cannot read it."""
        with translated("reading a job"):
            found = self._jobs.find_one({"_id": job_key(job_id)})
        if found is None:
            raise NotFound(f"there is no job {job_id}: it was never submitted here, or its history has been pruned")
        return job_or_conflict(found)

    def open_ranges(self, job: Job) -> None:
        """Insert the ranges of a job's plan that do not exist yet. Safe for anyone to repeat."""
        assert job.plan is not None
        of = job.plan.range_count
        reach(Step.PLANNED)
        self._ledger.open(job.id, (cut(job.source.size, of, index) for index in range(of)))
        reach(Step.OPENED)

    def stop(self, job: Job, stop: Stop) -> None:
        """Stamp a job as stopping, so that the holders of its ranges let go; the first stamp holds. A job that is
        terminal, or has been retried since `job` was read, stays as it is."""
        stamp: Document = {"to": stop.to, "failure": failure_document(stop.failure)}
        with translated("stopping a job"):
            self._jobs.update_one(
                {"_id": job_key(job.id), "open": True, "stopping": None, "round": job.round},
                [
                    {
                        "$set": {"stopping": {"$literal": stamp}, "waiting": "$$REMOVE"}
                        | happened(f"told to stop: {stop.to}")
                    }
                ],
            )
        self.settle(job.id)

    def stop_overdue(self) -> int:
        """Stop jobs that have run past their deadline, at most `PAGE_JOBS` of them; returns how many."""
        late = {"deadline": {"$type": "date"}, "$expr": {"$lt": ["$deadline", "$$NOW"]}, "stopping": None}
        with translated("looking for overdue jobs"), self._jobs.find(late).hint(DEADLINES) as cursor:
            found = list(islice(filter(None, map(self.open_jobs.read, cursor)), PAGE_JOBS))
        for job in found:
            message = (
                f"the job ran for more than timeoutSeconds={job.options.timeout_seconds}: retry the job to go on from here, or "
                "submit a new one that may run longer"
            )
            self.stop(job, Stop(JobState.FAILED, Failure("timeout", message)))
        return len(found)

    def admit_due(self, most: int) -> int:
        """Let workers see waiting jobs whose time has come, at most `most`, the earliest first; returns how many."""
        due = {"waiting": True, "$expr": {"$lte": ["$notBefore", "$$NOW"]}}
        with translated("looking for jobs that are due"):
            found = self._jobs.find(due, {"_id": True}).sort("notBefore", 1).hint(WAITING_JOBS).limit(most)
            if not (keys := [job["_id"] for job in found]):
                return 0
            return self._jobs.update_many({"_id": {"$in": keys}} | due, {"$unset": {"waiting": ""}}).modified_count

    def settle(self, job_id: str) -> Job:
        """End a job if nothing is left to wait for; returns the job as it is afterwards. Safe for anyone to repeat."""
        return self._settle(self.get(job_id))

    def _settle(self, job: Job) -> Job:
        if job.state in TERMINAL:
            return job
        if job.plan is None:
            return job if job.stopping is None else self._end(job, job.stopping)
        summary = self._ledger.summarize(job.id)
        if summary.ranges < job.plan.range_count:
            # The planner died before it inserted all ranges, or is about to lease the only one: insert them for anyone.
            self.open_ranges(job)
            summary = self._ledger.summarize(job.id)
        complete = summary.done == job.plan.range_count
        if job.stopping is not None and not (complete and job.stopping.to is JobState.CANCELLED):
            return job if summary.leased else self._end(job, job.stopping, summary.progress(job.plan.range_count))
        if summary.done + summary.failed < job.plan.range_count:
            return job
        if not summary.failed:
            return self.finish(job, summary.tally)
        failure = summary.failures[0] if summary.failures else Failure("failed", "a range failed")
        if summary.failed > 1:
            failure = Failure(failure.code, f"{summary.failed} ranges failed; the first: {failure.message}")
        return self._end(job, Stop(JobState.FAILED, failure), summary.progress(job.plan.range_count))

    def finish(self, job: Job, tally: Tally) -> Job:
        """End a job whose ranges are all DONE and add up to `tally`: COMPLETED, or FAILED if over its error budget."""
        assert job.plan is not None
        reach(Step.FINISH)
        return self._end(job, _judged(job, tally), Progress(tally, job.plan.range_count, job.plan.range_count))

    def finish_all(self, ended: Sequence[tuple[Job, Tally]]) -> list[Job]:
        """Finish jobs of one range each, all with one command; returns them as they are afterwards."""
        reach(Step.FINISH)
        judged = [(job, _judged(job, tally), Progress(tally, 1, 1)) for job, tally in ended]
        writes = [UpdateOne(query, [{"$set": changes}]) for query, changes in (self._ending(*each) for each in judged)]
        with translated("ending jobs"):
            matched = write_all(self._jobs, writes)["nMatched"]
        reach(Step.FINISHED)
        for job, _ in ended:
            self._release_dry_run_claims(job)
        if matched == len(ended):
            return [replace(job, state=stop.to) for job, stop, _ in judged]
        return [self.settle(job.id) for job, _ in ended]

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once if none of its ranges is leased, else as soon as the holders let go. Safe to repeat.

        Raises:
            NotFound: no such job.
            Conflict: it has COMPLETED or FAILED, or is about to; or this version cannot read it.
        """
        job = self.get(job_id)
        if job.state is JobState.PENDING and job.stopping is None:
            # None of its ranges is leased, so one write ends it: nobody sees it stamped and still open.
            job = self._end(job, Stop(JobState.CANCELLED))
        if job.state not in TERMINAL:
            self.stop(job, Stop(JobState.CANCELLED))
            job = self.get(job_id)
        if job.state in TERMINAL and job.state is not JobState.CANCELLED:
            raise Conflict(f"job {job_id} is already {job.state}: there is nothing to cancel")
        if job.stopping is not None and job.stopping.to is not JobState.CANCELLED:
            raise Conflict(
                f"job {job_id} is already being stopped, and will be {job.stopping.to}: there is nothing to cancel"
            )
        return job

    def retry(self, job_id: str) -> Job:
        """Reopen a FAILED or CANCELLED job for those of its ranges that are not DONE. Safe to repeat while it is open.

        Raises:
            NotFound: no such job.
            Conflict: it has COMPLETED, is still stopping or is being deleted; its collection cannot take documents any
                more; or this version cannot read it.
        """
        job = self.get(job_id)
        if job.state is JobState.COMPLETED:
            raise Conflict(f"job {job_id} is COMPLETED: all its ranges are done, so there is nothing to retry")
        if job.state not in TERMINAL:
            if job.stopping is not None:
                raise Conflict(f"job {job_id} is still stopping: retry it when it is {job.stopping.to}")
            return job
        with translated("retrying a job"):
            pruned = self._jobs.find_one({"_id": job_key(job_id), "pruned": True}, {"_id": True})
        if pruned is not None:
            raise Conflict(f"the history of job {job_id} is being deleted: submit a new job")
        try:
            check_collection(self._store.data, job.options.collection)
        except Refused as error:
            raise Conflict(f"{error} in a new job") from None
        shared = job.plan is not None and job.plan.sole and self._loads.others_loaded(job, job.plan.format)
        self._ledger.reopen(job_id)
        to = JobState.PENDING if job.plan is None else JobState.PROCESSING
        gone = ("stopping", "failure", "finishedAt")
        changes: Document = {"state": to, "open": True, "attempts": 0, "round": job.round + 1, "retriedAt": "$$NOW"}
        # A job that was put off may begin at once; one whose `runAt` has not come still waits for it.
        changes |= put_off("$options.runAt")
        if job.options.timeout_seconds is not None and job.plan is not None:
            changes["deadline"] = from_now(job.options.timeout_seconds)
        if job.started_at is not None:
            since = {"$subtract": ["$$NOW", "$finishedAt"]}
            changes["idleMilliseconds"] = {"$add": [{"$ifNull": ["$idleMilliseconds", 0]}, since]}
        if shared:
            changes["plan.sole"] = False
        changes |= happened("retried")
        changes |= dict.fromkeys(gone, "$$REMOVE")
        # If somebody else was quicker, the job is returned as they left it.
        as_it_was = {"_id": job_key(job_id), "state": job.state, "round": job.round, "pruned": None}
        with translated("retrying a job"):
            self._jobs.update_one(as_it_was, [{"$set": changes}])
        self._store.wake()
        return self.get(job_id)

    def _end(self, job: Job, stop: Stop, progress: Progress | None = None) -> Job:
        query, changes = self._ending(job, stop, progress)
        with translated("ending a job"):
            found = self._jobs.find_one_and_update(query, [{"$set": changes}], return_document=ReturnDocument.AFTER)
        reach(Step.FINISHED)
        if progress is not None and progress.ranges_done == progress.ranges_total:
            self._release_dry_run_claims(job)
        return self.get(job.id) if found is None else job_of(found)

    def _release_dry_run_claims(self, job: Job) -> None:
        """Release the keys that a dry run has claimed, once all its ranges are DONE: nothing will look at them again.

        If that fails or takes long, the job has ended all the same; the rest is released when its history is deleted.
        """
        if job.options.validate:
            try:
                end = time.monotonic() + RELEASE_SECONDS
                with translated("releasing the claims of a dry run"):
                    delete_slices(self._store.claims, claims_of(job_key(job.id)), lambda: time.monotonic() < end)
            except HeadraceError as error:
                log.warning(str(error), action="finish", job=job.id)

    def _ending(self, job: Job, stop: Stop, progress: Progress | None) -> tuple[Document, Document]:
        """The query for a job that is to end, and the fields to set; `progress` is None if the job has no plan."""
        changes: Document = {
            "state": stop.to,
            "open": "$$REMOVE",
            "stopping": "$$REMOVE",
            "deadline": "$$REMOVE",
            "planner": "$$REMOVE",
            "waiting": "$$REMOVE",
            "finishedAt": "$$NOW",
            "failure": {"$literal": failure_document(stop.failure)},
        } | happened(stop.to)
        if progress is not None:
            changes["progress"] = progress_document(progress)
            changes["errors"] = self._rejects.first_of(job.id, progress.tally)
        # A stamp that has arrived since must not be overtaken by COMPLETED, nor the other way round; and a retry begins
        # another round, to which the sums made here do not apply.
        stamped = {"stopping": None} if job.stopping is None else {"stopping": {"$ne": None}}
        return {"_id": job_key(job.id), "open": True, "state": job.state, "round": job.round} | stamped, changes

    def freed(self, job_id: str, what: str) -> None:
        """Note that ranges of a job were freed, and end the job if it was waiting for nothing else: under a stream of
        higher-priority jobs, no worker might look at it for a long time."""
        self.note(job_id, what)
        with translated("looking up a job"):
            found = self._jobs.find_one({"_id": job_key(job_id), "database": self._database})
        if found is not None and (job := self.open_jobs.read(found)) is not None:
            self._settle(job)

    def note(self, job_id: str, what: str) -> None:
        """Append an event to a job's timeline."""
        with translated("recording an event of a job"):
            self._jobs.update_one({"_id": job_key(job_id)}, [{"$set": happened(what)}])


def _judged(job: Job, tally: Tally) -> Stop:
    """How a job whose ranges are all DONE ends."""
    failure = overspent(job.options, tally, final=True)
    return Stop(JobState.COMPLETED) if failure is None else Stop(JobState.FAILED, failure)
