"""Ranges in MongoDB: open, lease, renew, close, give back, release, sum.

Only the holder of a lease's token may write to its range: every write of a holder matches `{_id, state, token}`, and no
match means that the lease was lost, or that its end was recorded already. All times are the server's (`$$NOW`), so no
worker's clock can steal a lease or block one.
"""

import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Final

from pymongo import InsertOne, ReturnDocument, UpdateOne

from engine.control.leases import (
    ATTEMPTS,
    LET_GO,
    TAKE_AWAY,
    UNSPENT_WAIT,
    come_to,
    done,
    held,
    held_by,
    new_range,
    taken_away,
    wait_ms,
)
from engine.control.schema import LEASABLE, LEASES
from engine.control.store import Document, Store, job_key, literals, ranges_of, translated, write_all
from engine.errors import HeadraceError, LeaseLost
from engine.model import ByteRange, Failure, Freed, Lease, Progress, RangeState, Tally

__all__ = ["HELD_SECONDS", "Ledger", "Summary"]

EXPIRY_GRACE_SECONDS: Final = 4
"""A lease is taken away this long after it ran out, so that after a database stall a live holder can renew it first."""

EXPIRED_RANGES: Final = 50
"""Expired ranges that one call frees: a fleet that died may leave thousands, and the first can be worked on while the
rest are freed."""

HELD_SECONDS: Final = 1.0
"""How soon a job whose ranges are held by others is looked at again."""

OPEN_BATCH: Final = 10_000
"""Ranges per insert command."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A job's ranges, summed: how many in all and in each state. `failures` holds up to three from FAILED ranges."""

    tally: Tally
    ranges: int
    ready: int
    leased: int
    done: int
    failed: int
    failures: tuple[Failure, ...]

    def progress(self, planned: int) -> Progress:
        """The progress of a job of that many planned ranges: some of them may not have been inserted yet."""
        return Progress(self.tally, planned, self.done)


class Ledger:
    """The ranges of all jobs.

    Args:
        store: the databases.
        lease_seconds: how long a lease lasts without renewal.
    """

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self._ranges = store.ranges
        self._lease_ms = int(lease_seconds * 1000)

    def open(self, job_id: str, ranges: Iterable[ByteRange]) -> None:
        """Insert the ranges of a job as READY. Those that exist already stay as they are."""
        job = job_key(job_id)
        rest = iter(ranges)
        while documents := [new_range(job, r) for r in islice(rest, OPEN_BATCH)]:
            with translated("recording the ranges of a job"):
                write_all(self._ranges, [InsertOne(document) for document in documents])

    def open_leased(self, ranges: Mapping[str, ByteRange], holder: str) -> dict[str, Lease]:
        """Insert the only range of each of these jobs as LEASED by `holder`, all with one command. Returns the leases
        by job id, without those of ranges that existed already."""
        leases = {id: Lease(id, range, uuid.uuid4().hex, 1, range.start, Tally()) for id, range in ranges.items()}
        writes = []
        for lease in leases.values():
            new = new_range(job_key(lease.job_id), lease.range)
            key = new.pop("_id")
            fields = literals(new) | held(lease.token, holder, self.until())
            # No range has this state, so nothing matches: the upsert inserts, or is refused if the range exists.
            writes.append(UpdateOne({"_id": key, "state": None}, [{"$set": fields}], upsert=True))
        if not writes:
            return {}
        with translated("leasing ranges"):
            made = {entry["index"] for entry in write_all(self._ranges, writes)["upserted"]}
        return {id: lease for index, (id, lease) in enumerate(leases.items()) if index in made}

    def lease(self, job_id: str, holder: str, *, ahead: bool = False) -> Lease | None:
        """Lease any READY range of a job whose `notBefore` has passed; None if there is none.

        `ahead`: the holder is still working on another range, and calls `begin` later. If it dies before that, its
        death is not counted against this range.
        """
        token = uuid.uuid4().hex
        with translated("leasing a range"):
            found = self._ranges.find_one_and_update(
                {"job": job_key(job_id), "state": RangeState.READY, "$expr": {"$lte": ["$notBefore", "$$NOW"]}},
                [{"$set": held(token, holder, self.until()) | {"ahead": token if ahead else "$$REMOVE"}}],
                return_document=ReturnDocument.BEFORE,
                hint=LEASABLE,
            )
        if found is None:
            return None
        return Lease(
            job_id=job_id,
            range=ByteRange(found["_id"]["index"], found["start"], found["end"]),
            token=token,
            number=found["leases"] + 1,
            confirmed=found["confirmed"],
            tally=Tally.from_document(found["tally"]),
            attempts=found["attempts"],
            deaths=found["deaths"] + found.get("vanished", 0),
            resumed=found["resumed"],
        )

    def begin(self, lease: Lease) -> None:
        """Start work on a lease that was taken ahead, and renew it. Raises LeaseLost."""
        self._speak(lease, self._begun(), "beginning a range")

    def renew(self, lease: Lease, confirmed: int, tally: Tally) -> None:
        """Extend a lease and record how far its holder has come. Raises LeaseLost."""
        self._speak(lease, come_to(confirmed, tally) | {"until": self.until()}, "renewing a lease")

    def close(self, lease: Lease, tally: Tally) -> None:
        """Mark a range DONE: every line of it is acknowledged. Raises LeaseLost."""
        self._let_go(lease, done(tally), "closing a range")

    def close_all(self, leases: Sequence[tuple[Lease, Tally]], begin: Lease | None = None) -> bool:
        """Close ranges, and `begin` work on a lease that was taken ahead, all with one command; returns False if some
        of these leases were no longer held."""
        # DONE, too: an earlier try whose answer was lost may have closed some of them.
        states = {"state": {"$in": [RangeState.LEASED, RangeState.DONE]}}
        writes = [UpdateOne(held_by(lease) | states, [{"$set": done(tally) | LET_GO}]) for lease, tally in leases]
        if begin is not None:
            writes.append(UpdateOne(held_by(begin), [{"$set": self._begun()}]))
        with translated("closing ranges"):
            return bool(write_all(self._ranges, writes)["nMatched"] == len(writes))

    def give_back(self, lease: Lease, confirmed: int, tally: Tally) -> None:
        """Release a range as READY for anyone from `confirmed` on, without spending an attempt. Raises LeaseLost."""
        self._let_go(lease, come_to(confirmed, tally) | {"state": RangeState.READY}, "giving a range back")

    def postpone(self, lease: Lease, confirmed: int, tally: Tally, failure: Failure, *, spend: bool = True) -> None:
        """Release a range after its nth transient failure in a row: READY, to be leased n⁴ seconds later (±10 %), or
        FAILED if no attempt is left.

        With `spend` false the failure costs no attempt, and the range can be leased 16 seconds later (±10 %).

        Raises LeaseLost.
        """
        attempts = (0 if confirmed > lease.confirmed else lease.attempts) + spend
        changes: Document = come_to(confirmed, tally) | {
            "attempts": attempts,
            "allFailures": {"$add": ["$allFailures", 1]},
            "failure": {"$literal": asdict(failure)},
        }
        if attempts > ATTEMPTS:
            changes["state"] = RangeState.FAILED
        else:
            changes["state"] = RangeState.READY
            changes["notBefore"] = {"$add": ["$$NOW", wait_ms(attempts if spend else UNSPENT_WAIT)]}
        self._let_go(lease, changes, "putting a range off")

    def release(self, holders: Iterable[str]) -> list[Freed]:
        """Free the ranges of holders that are known to be dead. One call may free only some of them: call again until
        it returns an empty list."""
        names = list(holders)
        if not names:
            return []
        return self._release({"state": RangeState.LEASED, "holder": {"$in": names}}, "deaths")

    def release_strays(self, holder: str, held: Sequence[str] = ()) -> None:
        """Free the stray leases of a live holder: those that it does not know of because the answer to its command was
        lost. Leases with a token in `held` stay."""
        with translated("freeing leases"):
            mine: Document = {"state": RangeState.LEASED, "holder": holder, "token": {"$nin": held}}
            tokens = [found["token"] for found in self._ranges.find(mine, {"token": True}, hint=LEASES)]
            if tokens:
                # Matched by token: if this times out, the server may still run it when the holder has another lease.
                fresh = {"state": RangeState.READY, "resumed": True}
                mine["token"] = {"$in": tokens}
                self._ranges.update_many(mine, [{"$set": fresh | TAKE_AWAY}], hint=LEASES)

    def expire(self) -> list[Freed]:
        """Free ranges whose leases ran out, at most `EXPIRED_RANGES`; further calls free the rest."""
        deadline = {"$subtract": ["$$NOW", EXPIRY_GRACE_SECONDS * 1000]}
        return self._release(
            {"state": RangeState.LEASED, "$expr": {"$lt": ["$until", deadline]}}, "vanished", EXPIRED_RANGES
        )

    def leased(self, job_ids: Iterable[str]) -> dict[str, int]:
        """The number of leased ranges of each of these jobs, by job id; jobs without any are left out."""
        keys = [job_key(job_id) for job_id in job_ids]
        if not keys:
            return {}
        stages: list[Document] = [
            {"$match": {"job": {"$in": keys}, "state": RangeState.LEASED}},
            {"$group": {"_id": "$job", "count": {"$sum": 1}}},
        ]
        with translated("counting leases"):
            return {str(found["_id"]): found["count"] for found in self._ranges.aggregate(stages, hint=LEASABLE)}

    def idle_seconds(self, job_id: str, most: float) -> float | None:
        """Seconds until one of this job's ranges may become leasable, when none is now: at most `most`, and at most
        `HELD_SECONDS` if one is LEASED, since that may be given back at any time.

        None: no range is READY or LEASED, so the job can be settled.
        """
        left = {"$divide": [{"$subtract": ["$notBefore", "$$NOW"]}, 1000]}
        soon = {"$cond": [{"$eq": ["$state", RangeState.LEASED]}, HELD_SECONDS, {"$max": [left, 0]}]}
        stages: list[Document] = [
            {"$match": {"job": job_key(job_id), "state": {"$in": [RangeState.READY, RangeState.LEASED]}}},
            {"$group": {"_id": None, "seconds": {"$min": soon}}},
        ]
        with translated("looking for open ranges"):
            found = next(iter(self._ranges.aggregate(stages, hint=LEASABLE)), None)
        return None if found is None else min(float(found["seconds"] or 0.0), most)

    def busy(self, job_id: str) -> bool:
        """Whether any range of the job is READY or LEASED."""
        query = {"job": job_key(job_id), "state": {"$in": [RangeState.READY, RangeState.LEASED]}}
        with translated("looking for open ranges"):
            return self._ranges.find_one(query, {"_id": 1}, hint=LEASABLE) is not None

    def any_begun(self, job_ids: Sequence[str]) -> bool:
        """Whether any range of these jobs has ever been leased."""
        if not job_ids:
            return False
        query: Document = {"$or": [ranges_of(job_key(job_id)) for job_id in job_ids], "leases": {"$gt": 0}}
        with translated("reading ranges"):
            return self._ranges.find_one(query, {"_id": 1}) is not None

    def summarize(self, job_id: str) -> Summary:
        """Sum up the ranges of a job."""
        job = job_key(job_id)
        total: Document = {name: {"$sum": f"$tally.{name}"} for name in Tally().document()}
        failure = {"$cond": [{"$eq": ["$state", RangeState.FAILED]}, "$failure", "$$REMOVE"]}
        stages: list[Document] = [
            {"$match": ranges_of(job)},
            {
                "$group": {
                    "_id": "$state",
                    "count": {"$sum": 1},
                    "failures": {"$firstN": {"input": failure, "n": 3}},
                    **total,
                }
            },
        ]
        with translated("summing the ranges of a job"):
            found = {group["_id"]: group for group in self._ranges.aggregate(stages)}
        counts = {state: found.get(state, {}).get("count", 0) for state in RangeState}
        failures = found.get(RangeState.FAILED, {}).get("failures", [])
        return Summary(
            sum((Tally.from_document(group) for group in found.values()), Tally()),
            sum(counts.values()),
            counts[RangeState.READY],
            counts[RangeState.LEASED],
            counts[RangeState.DONE],
            counts[RangeState.FAILED],
            tuple(Failure(**f) for f in failures if f),
        )

    def reopen(self, job_id: str) -> None:
        """Prepare an explicit retry: every READY or FAILED range may be leased at once, with all its attempts."""
        query = ranges_of(job_key(job_id)) | {"state": {"$in": [RangeState.READY, RangeState.FAILED]}}
        fresh = {"state": RangeState.READY, "attempts": 0, "deaths": 0, "vanished": 0, "resumed": True}
        with translated("reopening the ranges of a job"):
            self._ranges.update_many(query, {"$set": fresh, "$unset": {"notBefore": "", "failure": ""}})

    def delete(self, job_id: str) -> None:
        """Delete the ranges of a job whose history is no longer kept."""
        with translated("deleting the ranges of a job"):
            self._ranges.delete_many(ranges_of(job_key(job_id)))

    def first_lines(self, job_id: str, indexes: Iterable[int]) -> dict[int, int]:
        """Lines of the file before each of these ranges, by index; ranges after an unfinished one are left out."""
        wanted = sorted(indexes)
        key = {"job": job_key(job_id), "index": wanted[-1]}
        before = {"documents": ["unbounded", -1]}
        unsure = {"$cond": [{"$eq": ["$state", RangeState.DONE]}, 0, 1]}
        sums = {
            "lines": {"$sum": "$tally.lines", "window": before},
            "unsure": {"$sum": unsure, "window": before},
        }
        stages: list[Document] = [
            {"$match": {"_id": {"$gte": key | {"index": 0}, "$lte": key}}},
            {"$setWindowFields": {"sortBy": {"_id.index": 1}, "output": sums}},
            {"$match": {"_id.index": {"$in": wanted}, "unsure": {"$in": [0, None]}}},
            {"$project": {"lines": {"$ifNull": ["$lines", 0]}}},
        ]
        with translated("counting the lines of ranges"):
            return {found["_id"]["index"]: found["lines"] for found in self._ranges.aggregate(stages)}

    def until(self) -> Document:
        """When a lease that begins now runs out, as an expression that the server evaluates."""
        return {"$add": ["$$NOW", self._lease_ms]}

    def _begun(self) -> Document:
        return {"ahead": "$$REMOVE", "until": self.until()}

    def _let_go(self, lease: Lease, changes: Document, doing: str) -> None:
        """Record how a lease ended. Succeeds, too, if an earlier try whose answer was lost has recorded it."""
        try:
            self._speak(lease, changes | LET_GO, doing)
        except LeaseLost:
            with translated(doing):
                if not self._ranges.find_one(held_by(lease) | {"state": {"$ne": RangeState.LEASED}}, {"_id": True}):
                    raise

    def _speak(self, lease: Lease, changes: Document, doing: str) -> None:
        with translated(doing):
            result = self._ranges.update_one(held_by(lease), [{"$set": changes}])
        if not result.matched_count:
            raise LeaseLost(
                f"the lease of range {lease.range.index} of job {lease.job_id} is no longer held by this worker"
            )

    def _release(self, query: Document, counter: str, most: int = sys.maxsize) -> list[Freed]:
        """Free ranges, counting a death or a disappearance against each; those that have had too many become FAILED.

        An error is raised only if it prevents the first range from being freed; after that, the ranges freed so far are
        returned, and the rest is left to the next call.
        """
        freed: list[Freed] = []
        with translated("looking for leases to free"):
            if self._ranges.find_one(query, {"_id": True}, hint=LEASES) is None:
                return freed
        changes = taken_away(counter)
        # One by one, so that each range that is returned was freed here and by nobody else.
        try:
            with translated("releasing leases"):
                while len(freed) < most and (
                    found := self._ranges.find_one_and_update(
                        query, [{"$set": changes}], projection={"holder": 1}, hint=LEASES
                    )
                ):
                    freed.append(Freed(str(found["_id"]["job"]), found["_id"]["index"], found["holder"]))
        except HeadraceError:
            if not freed:
                raise
        return freed
