"""Ranges in MongoDB: open, lease, renew, close, give back, release, sum.

Only the holder of a lease's token may speak for its range: every write of a holder matches `{_id, state, token}`, and no
match means that the lease was lost, or that its end was heard already. All times are the server's (`$$NOW`), so no
worker's clock can steal or stall.
"""

import random
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Final

from bson import ObjectId
from pymongo import InsertOne, ReturnDocument, UpdateOne

from engine.control.schema import LEASABLE, LEASES
from engine.control.store import Document, Store, job_key, literals, ranges_of, translated, write_all
from engine.errors import HeadraceError, LeaseLost
from engine.model import ByteRange, Failure, Freed, Lease, RangeState, Tally

__all__ = ["ATTEMPTS", "DEATHS", "HELD_SECONDS", "UNSPENT_WAIT", "VANISHED", "Ledger", "Summary", "wait_ms"]

ATTEMPTS: Final = 5
"""Transient failures in a row, without a byte of progress between them, before a range is given up."""

DEATHS: Final = 3
"""Holders that may die in a row at one `confirmed` before a range is given up."""

VANISHED: Final = 10
"""Holders that may die or vanish in a row at one `confirmed` before a range is given up: more than die, since what takes a
whole host away, with all who could tell of a death, is seldom a line."""

UNSPENT_WAIT: Final = 2
"""A failure that costs no attempt (such as a host's wrong clock) is followed by the wait of this many attempts."""

EXPIRY_GRACE_SECONDS: Final = 4
"""A lease is taken away this long after it ran out: after a stall of the database its live holder comes first."""

EXPIRED_RANGES: Final = 50
"""Ranges that are freed at a time when their leases ran out: of a fleet that died there may be thousands, and those that are
free already can be worked on."""

HELD_SECONDS: Final = 1.0
"""How soon a job is looked at again whose ranges others hold."""

MAX_HOLDERS: Final = 10
"""Holders that a range remembers."""

OPEN_BATCH: Final = 10_000
"""Ranges in one insert."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A job's ranges, summed. `failures` holds those of the first few ranges that FAILED."""

    tally: Tally
    ranges: int
    ready: int
    leased: int
    done: int
    failed: int
    failures: tuple[Failure, ...]


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
        """Put the ranges of a job down as READY. Those that are there already stay as they are."""
        job = job_key(job_id)
        rest = iter(ranges)
        while documents := [_new(job, r) for r in islice(rest, OPEN_BATCH)]:
            with translated("writing down the ranges of a job"):
                write_all(self._ranges, [InsertOne(document) for document in documents])

    def open_leased(self, ranges: Mapping[str, ByteRange], holder: str) -> dict[str, Lease]:
        """Put the only ranges of these jobs down as LEASED by `holder`, all with one command. Those that are there already
        are left out."""
        leases = {id: Lease(id, range, uuid.uuid4().hex, 1, range.start, Tally()) for id, range in ranges.items()}
        writes = []
        for lease in leases.values():
            new = _new(job_key(lease.job_id), lease.range)
            key = new.pop("_id")
            fields = literals(new) | self._held(lease.token, holder)
            # A state that no range has: the update matches none, and an upsert of one that is there is refused.
            writes.append(UpdateOne({"_id": key, "state": None}, [{"$set": fields}], upsert=True))
        if not writes:
            return {}
        with translated("leasing ranges"):
            made = {entry["index"] for entry in write_all(self._ranges, writes)["upserted"]}
        return {id: lease for index, (id, lease) in enumerate(leases.items()) if index in made}

    def lease(self, job_id: str, holder: str, *, ahead: bool = False) -> Lease | None:
        """Lease any READY range of a job whose time has come; None where there is none.

        `ahead`: the holder still works on another range, and calls `begin` later. If it dies before that, its death is not
        counted against this range.
        """
        token = uuid.uuid4().hex
        with translated("leasing a range"):
            found = self._ranges.find_one_and_update(
                {"job": job_key(job_id), "state": RangeState.READY, "$expr": {"$lte": ["$notBefore", "$$NOW"]}},
                [{"$set": self._held(token, holder) | {"ahead": token if ahead else "$$REMOVE"}}],
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
        """The holder of a lease that it took ahead is at work on it from now on. Raises LeaseLost."""
        self._speak(lease, {"ahead": "$$REMOVE", "until": self.until()}, "beginning a range")

    def renew(self, lease: Lease, confirmed: int, tally: Tally) -> None:
        """Prolong a lease and record how far it came. Raises LeaseLost."""
        self._speak(lease, _come_to(confirmed, tally) | {"until": self.until()}, "renewing a lease")

    def close(self, lease: Lease, tally: Tally) -> None:
        """Every line of the range is acknowledged: it is DONE. Raises LeaseLost."""
        self._let_go(lease, _done(tally), "closing a range")

    def close_all(self, leases: Sequence[tuple[Lease, Tally]]) -> bool:
        """Close ranges, all with one command; False where not all of them were held any more."""
        # Those that an earlier try has closed, whose answer was lost, are closed once more.
        done = {"state": {"$in": [RangeState.LEASED, RangeState.DONE]}}
        writes = [UpdateOne(_held_by(lease) | done, [{"$set": _done(tally) | _LET_GO}]) for lease, tally in leases]
        with translated("closing ranges"):
            return bool(write_all(self._ranges, writes)["nMatched"] == len(leases))

    def give_back(self, lease: Lease, confirmed: int, tally: Tally) -> None:
        """Let go of a range, READY for anyone at `confirmed`, without spending an attempt. Raises LeaseLost."""
        self._let_go(lease, _come_to(confirmed, tally) | {"state": RangeState.READY}, "giving a range back")

    def postpone(self, lease: Lease, confirmed: int, tally: Tally, failure: Failure, *, spend: bool = True) -> None:
        """Let go after a transient failure: READY again n⁴ seconds later (±10 %), or FAILED when no attempt is left.

        With `spend` false it costs no attempt, and is READY again after a fixed time.

        Raises LeaseLost.
        """
        attempts = (0 if confirmed > lease.confirmed else lease.attempts) + spend
        changes: Document = _come_to(confirmed, tally) | {
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
        """Free the ranges of holders that are known to be dead. What it returns may be some of them: nothing is held by them any
        more when it returns none."""
        names = list(holders)
        if not names:
            return []
        return self._release({"state": RangeState.LEASED, "holder": {"$in": names}}, "deaths")

    def release_strays(self, holder: str, held: Sequence[str] = ()) -> None:
        """Free the stray leases of a live holder: those that it does not know of, since the answer to its command was lost.
        Leases with a token in `held` stay."""
        with translated("freeing leases"):
            mine: Document = {"state": RangeState.LEASED, "holder": holder, "token": {"$nin": held}}
            tokens = [found["token"] for found in self._ranges.find(mine, {"token": True}, hint=LEASES)]
            if tokens:
                # By their tokens: where this is answered too late, the server may get to it when the holder has the next lease.
                fresh = {"state": RangeState.READY, "resumed": True}
                mine["token"] = {"$in": tokens}
                self._ranges.update_many(mine, [{"$set": fresh | _TAKE_AWAY}], hint=LEASES)

    def expire(self) -> list[Freed]:
        """Free the ranges whose leases ran out: `EXPIRED_RANGES` at the most, and the others when it is called again."""
        deadline = {"$subtract": ["$$NOW", EXPIRY_GRACE_SECONDS * 1000]}
        return self._release(
            {"state": RangeState.LEASED, "$expr": {"$lt": ["$until", deadline]}}, "vanished", EXPIRED_RANGES
        )

    def leased(self, job_ids: Iterable[str]) -> dict[str, int]:
        """How many ranges of each of these jobs are leased; jobs without are left out."""
        stages: list[Document] = [
            {"$match": {"job": {"$in": [job_key(job_id) for job_id in job_ids]}, "state": RangeState.LEASED}},
            {"$group": {"_id": "$job", "count": {"$sum": 1}}},
        ]
        with translated("counting leases"):
            return {str(found["_id"]): found["count"] for found in self._ranges.aggregate(stages, hint=LEASABLE)}

    def idle_seconds(self, job_id: str, most: float) -> float | None:
        """Seconds until a range of this job, none of which can be leased now, may be leasable: `most` at most, and `HELD_SECONDS`
        where one is LEASED, since that may be given back at any time.

        None: no range is READY or LEASED, so that the job can be settled.
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
        """Whether any range of these jobs has been leased, ever."""
        if not job_ids:
            return False
        query: Document = {"$or": [ranges_of(job_key(job_id)) for job_id in job_ids], "leases": {"$gt": 0}}
        with translated("looking at ranges"):
            return self._ranges.find_one(query, {"_id": 1}) is not None

    def summarize(self, job_id: str) -> Summary:
        """Add up the ranges of a job."""
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
        """For an explicit retry: every range that is not DONE may be leased at once, with all its attempts."""
        query = ranges_of(job_key(job_id)) | {"state": {"$in": [RangeState.READY, RangeState.FAILED]}}
        fresh = {"state": RangeState.READY, "attempts": 0, "deaths": 0, "vanished": 0, "resumed": True}
        with translated("reopening the ranges of a job"):
            self._ranges.update_many(query, {"$set": fresh, "$unset": {"notBefore": "", "failure": ""}})

    def delete(self, job_id: str) -> None:
        """Delete the ranges of a job whose history is no longer kept."""
        with translated("deleting the ranges of a job"):
            self._ranges.delete_many(ranges_of(job_key(job_id)))

    def first_lines(self, job_id: str, indexes: Iterable[int]) -> dict[int, int]:
        """The number of lines of the file before each of these ranges, by index; those behind an unfinished one are left out."""
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
        """When a lease that begins now runs out, as an expression of the server's."""
        return {"$add": ["$$NOW", self._lease_ms]}

    def _held(self, token: str, holder: str) -> Document:
        earlier = {"$filter": {"input": {"$ifNull": ["$holders", []]}, "cond": {"$ne": ["$$this", holder]}}}
        return {
            "state": RangeState.LEASED,
            "token": token,
            "holder": holder,
            "until": self.until(),
            "leases": {"$add": [{"$ifNull": ["$leases", 0]}, 1]},
            "holders": {"$slice": [{"$concatArrays": [earlier, [holder]]}, -MAX_HOLDERS]},
        }

    def _let_go(self, lease: Lease, changes: Document, doing: str) -> None:
        """Say how a lease ended, which may have been heard already: the answer to an earlier try was lost."""
        try:
            self._speak(lease, changes | _LET_GO, doing)
        except LeaseLost:
            with translated(doing):
                if not self._ranges.find_one(_held_by(lease) | {"state": {"$ne": RangeState.LEASED}}, {"_id": True}):
                    raise

    def _speak(self, lease: Lease, changes: Document, doing: str) -> None:
        with translated(doing):
            result = self._ranges.update_one(_held_by(lease), [{"$set": changes}])
        if not result.matched_count:
            raise LeaseLost(
                f"the lease of range {lease.range.index} of job {lease.job_id} is held by somebody else now"
            )

    def _release(self, query: Document, counter: str, most: int = sys.maxsize) -> list[Freed]:
        """Free ranges, and count a death or a vanishing of their holders; give those up that have seen too many.

        Raises what kept it from freeing the first; where it is a later one, those before are told, and the rest are for the
        next time.
        """
        freed: list[Freed] = []
        with translated("looking for leases to free"):
            if self._ranges.find_one(query, {"_id": True}, hint=LEASES) is None:
                return freed
        changes = _taken_away(counter)
        # One by one: what is told as freed was freed here, and by nobody else.
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


def _new(job: ObjectId, range: ByteRange) -> Document:
    return {
        "_id": {"job": job, "index": range.index},
        "job": job,
        "state": RangeState.READY,
        "start": range.start,
        "end": range.end,
        "confirmed": range.start,
        "tally": Tally().document(),
        "attempts": 0,
        "deaths": 0,
        "vanished": 0,
        "leases": 0,
        "resumed": False,
        # What is told to people, and never begins anew.
        "allDeaths": 0,
        "allFailures": 0,
        "holders": [],
    }


def _held_by(lease: Lease) -> Document:
    """Matches the range of a lease as long as it is held under it."""
    key = {"job": job_key(lease.job_id), "index": lease.range.index}
    return {"_id": key, "state": RangeState.LEASED, "token": lease.token}


def _done(tally: Tally) -> Document:
    return {"state": RangeState.DONE, "tally": {"$literal": tally.document()}, "confirmed": "$end", "failure": None}


def _come_to(confirmed: int, tally: Tally) -> Document:
    """Sets how far a range has come; what was counted in a row begins anew when it has moved."""
    moved = {"$gt": [confirmed, "$confirmed"]}
    in_a_row = {name: {"$cond": [moved, 0, f"${name}"]} for name in ("deaths", "vanished", "attempts")}
    return in_a_row | {"confirmed": confirmed, "tally": {"$literal": tally.document()}, "resumed": True}


def wait_ms(attempts: int) -> int:
    """How long to wait after so many failures in a row: n⁴ seconds, ±10 % so that not all come back at once."""
    return int(attempts**4 * 1000 * random.uniform(0.9, 1.1))


_LET_GO: Final[Document] = {"holder": "$$REMOVE", "until": "$$REMOVE", "ahead": "$$REMOVE"}
"""The token stays until the next lease, so that a holder who was not answered sees that it was heard."""

_TAKE_AWAY: Final[Document] = _LET_GO | {"token": "$$REMOVE"}


def _taken_away(counter: str) -> Document:
    """Sets what becomes of a range whose holder died (`counter` is "deaths") or did not renew its lease ("vanished"): READY, or
    FAILED where this was one too many in a row. A holder that had leased it ahead, and not begun, is not counted."""
    # The token, since versions that know no `ahead` leave it where it is.
    begun: Document = {"$cond": [{"$eq": ["$ahead", "$token"]}, 0, 1]}
    count: Document = {name: f"${name}" for name in ("deaths", "vanished")}
    count[counter] = {"$add": [f"${counter}", begun]}
    in_all = {"$add": list(count.values())}
    message: list[Any] = [
        {"$toString": in_all},
        " workers in a row died at byte ",
        {"$toString": "$confirmed"},
        " of the range from byte ",
        {"$toString": "$start"},
        " to ",
        {"$toString": "$end"},
        ": look at the lines there, then retry the job",
    ]
    poison = {"code": "workers_died", "message": {"$concat": message}}
    spent = {"$or": [{"$gte": [count["deaths"], DEATHS]}, {"$gte": [in_all, VANISHED]}]}
    return (
        count
        | _TAKE_AWAY
        | {
            "allDeaths": {"$add": ["$allDeaths", begun]},
            "state": {"$cond": [spent, RangeState.FAILED, RangeState.READY]},
            "failure": {"$cond": [spent, poison, "$failure"]},
            "resumed": True,
        }
    )
