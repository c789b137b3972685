"""How a range and its lease are stored in MongoDB: the document of a range, and the fields to set at each of its moves.
No I/O."""

import random
from typing import Any, Final

from bson import ObjectId

from engine.control.store import Document, job_key
from engine.model import ByteRange, Lease, RangeState, Tally

__all__ = [
    "ATTEMPTS",
    "DEATHS",
    "LET_GO",
    "TAKE_AWAY",
    "UNSPENT_WAIT",
    "VANISHED",
    "come_to",
    "done",
    "held",
    "held_by",
    "new_range",
    "taken_away",
    "wait_ms",
]

ATTEMPTS: Final = 5
"""Transient failures in a row, with no byte of progress between them, that a range survives; the next fails it."""

DEATHS: Final = 3
"""A range is given up when this many holders in a row have died at one `confirmed`."""

VANISHED: Final = 10
"""A range is given up when this many holders in a row have died or vanished at one `confirmed`. More than `DEATHS`,
since the loss of a whole host, with everyone who could report a death, is seldom the fault of a line."""

UNSPENT_WAIT: Final = 2
"""A failure that costs no attempt (such as a host's wrong clock) has the backoff of this many attempts: 16 seconds."""

MAX_HOLDERS: Final = 10
"""Holders whose names a range keeps, the latest ones."""


def new_range(job: ObjectId, range: ByteRange) -> Document:
    """A range of a job before anyone has leased it."""
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
        # Shown to people, and never reset.
        "allDeaths": 0,
        "allFailures": 0,
        "holders": [],
    }


def held_by(lease: Lease) -> Document:
    """Matches the range of a lease for as long as this lease holds it."""
    key = {"job": job_key(lease.job_id), "index": lease.range.index}
    return {"_id": key, "state": RangeState.LEASED, "token": lease.token}


def held(token: str, holder: str, until: Document) -> Document:
    """Fields to set: a new lease, which runs out at `until`, an expression."""
    earlier = {"$filter": {"input": {"$ifNull": ["$holders", []]}, "cond": {"$ne": ["$$this", holder]}}}
    return {
        "state": RangeState.LEASED,
        "token": token,
        "holder": holder,
        "until": until,
        "leases": {"$add": [{"$ifNull": ["$leases", 0]}, 1]},
        "holders": {"$slice": [{"$concatArrays": [earlier, [holder]]}, -MAX_HOLDERS]},
    }


def done(tally: Tally) -> Document:
    """Fields to set: every line of the range is acknowledged."""
    return {"state": RangeState.DONE, "tally": {"$literal": tally.document()}, "confirmed": "$end", "failure": None}


def come_to(confirmed: int, tally: Tally) -> Document:
    """Fields to set: how far a range has come; if it has advanced, the counts of consecutive troubles restart at 0."""
    moved = {"$gt": [confirmed, "$confirmed"]}
    in_a_row = {name: {"$cond": [moved, 0, f"${name}"]} for name in ("deaths", "vanished", "attempts")}
    return in_a_row | {"confirmed": confirmed, "tally": {"$literal": tally.document()}, "resumed": True}


def wait_ms(attempts: int) -> int:
    """Milliseconds to wait after n failures in a row: n⁴ seconds, ±10 % so that not all come back at once."""
    return int(attempts**4 * 1000 * random.uniform(0.9, 1.1))


LET_GO: Final[Document] = {"holder": "$$REMOVE", "until": "$$REMOVE", "ahead": "$$REMOVE"}
"""The token stays until the next lease, so that a holder that got no answer can see that its write took effect."""

TAKE_AWAY: Final[Document] = LET_GO | {"token": "$$REMOVE"}


def taken_away(counter: str) -> Document:
    """Fields to set on a range whose holder died (`counter` is "deaths") or did not renew its lease ("vanished"): it
    becomes READY, or FAILED if this was one too many in a row. A holder that leased it ahead and had not begun is not
    counted."""
    # Compared with the token because older versions, which do not know `ahead`, leave it in place when they lease.
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
        | TAKE_AWAY
        | {
            "allDeaths": {"$add": ["$allDeaths", begun]},
            "state": {"$cond": [spent, RangeState.FAILED, RangeState.READY]},
            "failure": {"$cond": [spent, poison, "$failure"]},
            "resumed": True,
        }
    )
