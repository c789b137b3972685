"""Jobs that have no plan yet: claiming them for planning, fixing the plan that holds, and putting them off."""

from collections.abc import Sequence

from pymongo import ReturnDocument, UpdateOne, WriteConcern

from engine.control.jobs import PUT_OFF, from_now, happened, job_of, planned, put_off
from engine.control.leases import ATTEMPTS, DEATHS, UNSPENT_WAIT, VANISHED, wait_ms
from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.schema import CLAIMED_JOBS
from engine.control.store import Document, Store, job_key, translated, write_all
from engine.errors import HeadraceError
from engine.logs import get_logger
from engine.model import Failure, Job, JobState, Plan, Stop

__all__ = ["Plans"]

log = get_logger()


class Plans:
    """Moves PENDING jobs on: claims, plans and postpones them.

    Args:
        store: the databases.
        queue, ledger: the jobs and their ranges.
    """

    def __init__(self, store: Store, queue: Queue, ledger: Ledger) -> None:
        self._jobs = store.jobs
        self._database = store.data.name
        self._queue = queue
        self._ledger = ledger

    def claim(self, jobs: Sequence[Job], holder: str) -> list[Job]:
        """Claim jobs for `holder` to plan, for the time of a lease; returns those of them that it has now claimed.

        A claim spares others the work but guards nothing, since the first plan to be fixed holds; so it does not wait
        for a majority. A job whose planners have died too many times in a row is stopped.
        """
        # These jobs may have changed since they were read: another worker may have put one off, or stopped it.
        pending: Document = {"state": JobState.PENDING, "stopping": None, "waiting": None}
        ids: Document = {"_id": {"$in": [job_key(job.id) for job in jobs]}} | pending
        mine = {"$eq": ["$planner.holder", holder]}  # claimed before, and the answer was lost
        # A missing time compares as less than any other.
        due = {"$lte": ["$notBefore", "$$NOW"]}
        free = {"$and": [due, {"$or": [{"$lte": ["$planner.until", "$$NOW"]}, mine]}]}
        lapsed = {"$cond": [{"$or": [mine, {"$lt": ["$planner.holder", ""]}]}, 0, 1]}
        counts = {name: {"$ifNull": [f"$planner.{name}", 0]} for name in ("deaths", "lapses")}
        counts["lapses"] = {"$add": [counts["lapses"], lapsed]}
        claim: list[Document] = [{"$set": {"planner": {"holder": holder, "until": self._ledger.until(), **counts}}}]
        quick = self._jobs.with_options(write_concern=WriteConcern(1))
        free_ones = ids | {"$expr": free}
        with translated("claiming jobs"):
            if len(jobs) == 1:  # in one round trip
                one = quick.find_one_and_update(free_ones, claim, return_document=ReturnDocument.AFTER)
                found = [] if one is None else [one]
            elif quick.update_many(free_ones, claim).matched_count:
                found = list(self._jobs.find(ids | {"planner.holder": holder}).sort("_id", 1))
            else:
                found = []
        left: list[Job] = []
        for job, planner in ((job_of(document), document["planner"]) for document in found):
            # A lapsed claim may belong to a planner that is only waiting, so it takes more of these than known deaths.
            if planner["deaths"] < DEATHS and job.planner_deaths < VANISHED:
                left.append(job)
                continue
            message = (
                f"{job.planner_deaths} workers in a row died while planning the job: check the object, then retry "
                "the job"
            )
            try:
                self._queue.stop(job, Stop(JobState.FAILED, Failure("workers_died", message)))
            except HeadraceError as error:
                # The others are claimed by now. This one is looked at again when its claim has lapsed.
                log.warning(str(error), action="plan", job=job.id, worker=holder)
        return left

    def release_claims(self, jobs: Sequence[Job], holder: str) -> None:
        """Release claims of `holder` on jobs that it has not looked at, so that anyone may plan them at once."""
        ids = {"_id": {"$in": [job_key(job.id) for job in jobs]}, "state": JobState.PENDING, "planner.holder": holder}
        with translated("giving jobs back"):
            self._jobs.update_many(ids, {"$unset": {"planner.until": "", "planner.holder": ""}})

    def release_claims_of_dead(self, holders: Sequence[str]) -> None:
        """Release the claims of dead holders, counting a death for each job, so that others may plan them at once."""
        if holders:
            theirs = {"$in": list(holders), "$type": "string"}  # the type is what lets the server use the index
            mine = {"open": True, "database": self._database, "planner.holder": theirs}
            dead = {"planner.deaths": {"$add": [{"$ifNull": ["$planner.deaths", 0]}, 1]}}
            with translated("freeing the jobs of a dead worker"):
                free = {"$unset": ["planner.until", "planner.holder"]}
                self._jobs.update_many(mine, [{"$set": dead}, free], hint=CLAIMED_JOBS)

    def fix(self, plans: Sequence[tuple[Job, Plan, str | None]]) -> list[Job]:
        """Fix plans, PENDING → PROCESSING, all with one command.

        Args:
            plans: a job, its plan, and the id of the job that has loaded its source before, if any.

        Returns the jobs as they are afterwards, in the same order, with the plans that hold, whoever made them.
        """
        writes: list[tuple[Document, list[Document]]] = []
        for job, plan, already_loaded_by in plans:
            changes = planned(plan, JobState.PROCESSING, already_loaded_by) | {"planner": "$$REMOVE"}
            if job.options.timeout_seconds is not None:
                changes["deadline"] = from_now(job.options.timeout_seconds)
            changes |= happened(f"planned: {plan.range_count} range{'s' if plan.range_count != 1 else ''}")
            writes.append((_unplanned(job), [{"$set": changes}]))
        if not writes:
            return []
        with translated("planning jobs"):
            if len(writes) == 1:  # in one round trip
                fixed = self._jobs.find_one_and_update(*writes[0], return_document=ReturnDocument.AFTER)
                if fixed is not None:
                    return [job_of(fixed)]
            else:
                write_all(self._jobs, [UpdateOne(query, changes) for query, changes in writes])
            found = self._jobs.find({"_id": {"$in": [job_key(job.id) for job, _, _ in plans]}})
            now = {job.id: job for job in map(job_of, found)}
        return [now[job.id] for job, _, _ in plans if job.id in now]

    def complete_unread(self, job: Job, plan: Plan, already_loaded_by: str | None) -> None:
        """PENDING → COMPLETED without reading: the object is empty, or is loaded already and `ifLoaded` is "skip"."""
        changes = planned(plan, JobState.COMPLETED, already_loaded_by)
        times = {"unread": True, "finishedAt": "$$NOW", "open": "$$REMOVE", "planner": "$$REMOVE"} | happened(
            JobState.COMPLETED
        )
        with translated("ending a job"):
            self._jobs.update_one(_unplanned(job), [{"$set": changes | times}])

    def postpone(self, job: Job, failure: Failure, *, spend: bool = True) -> None:
        """Put off a job that could not be planned for the nth time by n⁴ seconds (±10 %), or stop it as FAILED if no
        attempt is left.

        With `spend` false the failure costs no attempt, and the wait is 16 seconds (±10 %).
        """
        attempts = job.attempts + spend
        changes: Document = {
            "attempts": attempts,
            "planner": "$$REMOVE",
            **put_off({"$add": ["$$NOW", wait_ms(attempts if spend else UNSPENT_WAIT)]}),
        }
        with translated("putting a job off"):
            found = self._jobs.update_one(
                # No match if another worker has since put it off, and so counted the attempt, or planned it.
                _unplanned(job) | {"attempts": job.attempts},
                [{"$set": changes | happened(f"{PUT_OFF}{failure.message}")}],
            )
        if attempts > ATTEMPTS and found.matched_count:
            self._queue.stop(job, Stop(JobState.FAILED, failure))


def _unplanned(job: Job) -> Document:
    """Matches a job that nobody has planned, stopped or retried since it was read."""
    return {"_id": job_key(job.id), "state": JobState.PENDING, "round": job.round, "stopping": None}
