"""What the control database must hold before it is used: its schema version, its indexes, its capped collection."""

from contextlib import suppress
from typing import Any, Final

from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.database import Database
from pymongo.errors import CollectionInvalid, OperationFailure

from engine.errors import StartError

__all__ = [
    "BY_FILE",
    "BY_STATE",
    "BY_VERSION",
    "CLAIMED_JOBS",
    "DEADLINES",
    "ENDED_JOBS",
    "LEASABLE",
    "LEASES",
    "OPEN_JOBS",
    "PRUNED_JOBS",
    "READY_JOBS",
    "STOPPING_JOBS",
    "WAITING_JOBS",
    "check",
    "prepare",
]

SCHEMA_VERSION: Final = 1
"""Version of the control database's layout. An engine refuses to start on a newer one."""

WIRE_VERSION: Final = 17
"""Wire version of MongoDB 6.0, the oldest major release with all aggregation operators used here, such as `$firstN`."""

WAKEUPS_BYTES: Final = 64 * 1024
"""Size in bytes of the capped collection that idle workers watch."""

WORKERS_SECONDS: Final = 600
"""The last report of a worker is deleted when it is this old."""

_NAMESPACE_EXISTS: Final = 48

OPEN_JOBS: Final = "open_jobs"
BY_FILE: Final = "by_file"
BY_STATE: Final = "by_state"
BY_VERSION: Final = "by_version"
CLAIMED_JOBS: Final = "claimed_jobs"
DEADLINES: Final = "deadlines"
ENDED_JOBS: Final = "ended_jobs"
PRUNED_JOBS: Final = "pruned_jobs"
READY_JOBS: Final = "ready_jobs"
STOPPING_JOBS: Final = "stopping_jobs"
WAITING_JOBS: Final = "waiting_jobs"
LEASABLE: Final = "leasable"
LEASES: Final = "leases"


def _index(name: str, *fields: str, where: dict[str, Any] | None = None, **more: Any) -> IndexModel:
    """An index. A field with a leading minus is descending; `where` restricts the index to matching documents."""
    keys = [(field.removeprefix("-"), DESCENDING if field.startswith("-") else ASCENDING) for field in fields]
    return IndexModel(keys, name=name, **({"partialFilterExpression": where} if where else {}), **more)


_BY_TICKET: Final = _index("by_ticket", "ticket.key", where={"ticket.key": {"$type": "string"}}, unique=True)

INDEXES: Final[dict[str, list[IndexModel]]] = {
    "jobs": [
        _index(OPEN_JOBS, "open", "-options.priority", "_id", where={"open": True}),
        # Lets workers skip jobs of other databases and jobs that wait for their time, which all open jobs may be.
        _index(READY_JOBS, "open", "database", "waiting", "-options.priority", "_id", where={"open": True}),
        _index(WAITING_JOBS, "notBefore", where={"waiting": True}),
        _index(ENDED_JOBS, "finishedAt", where={"finishedAt": {"$type": "date"}}),
        _index(CLAIMED_JOBS, "planner.holder", where={"planner.holder": {"$type": "string"}}),
        _index(STOPPING_JOBS, "stopping.to", where={"stopping.to": {"$type": "string"}}),
        _index(PRUNED_JOBS, "pruned", where={"pruned": True}),
        _index(DEADLINES, "deadline", where={"deadline": {"$type": "date"}}),
        _BY_TICKET,
        _index("by_batch", "batch", "source.key", where={"batch": {"$type": "objectId"}}, unique=True),
        _index(BY_FILE, "source.key", "-_id"),
        # A key that is overwritten every minute has thousands of versions.
        _index(BY_VERSION, "source.key", "source.etag", "-_id"),
        _index("by_collection", "options.collection", "-_id"),
        _index(BY_STATE, "state", "-_id"),
    ],
    "batches": [_BY_TICKET],
    "workers": [_index("silent", "at", expireAfterSeconds=WORKERS_SECONDS)],
    "uploads": [_index("by_age", "createdAt")],
    "ranges": [
        _index(LEASABLE, "job", "state", where={"state": {"$in": ["READY", "LEASED"]}}),
        _index(LEASES, "state", "until", where={"state": "LEASED"}),
    ],
    "sources": [
        _index(
            "source",
            *(f"source.{name}" for name in ("bucket", "key", "etag", "version", "size")),
            "format",
            "generation",
            unique=True,
        ),
        _index("tag", "tag", unique=True),
    ],
}
"""The indexes of each collection."""


def check(control: Database[dict[str, Any]]) -> None:
    """Check the versions of MongoDB and of the schema.

    Raises:
        StartError: the control database was written by a newer version, or MongoDB is too old.
        PyMongoError: as the driver raises it.
    """
    if control.command("hello").get("maxWireVersion", 0) < WIRE_VERSION:
        raise StartError("this MongoDB is older than 6.0: upgrade it, or set MONGO_URI to a newer one")
    found = control["schema"].find_one({"_id": "version"})
    if found is not None and found["version"] > SCHEMA_VERSION:
        raise StartError(
            f"the control database {control.name} has schema version {found['version']}, but this engine knows "
            f"{SCHEMA_VERSION}: upgrade Headrace here, or set ENGINE_CONTROL_DB to another name"
        )


def prepare(control: Database[dict[str, Any]]) -> None:
    """Create what is missing of the schema version, the indexes and the capped collection. Raises as `check` does."""
    check(control)
    control["schema"].update_one({"_id": "version"}, {"$setOnInsert": {"version": SCHEMA_VERSION}}, upsert=True)
    for name, indexes in INDEXES.items():
        control[name].create_indexes(indexes)
    _prepare_wakeups(control)


def _prepare_wakeups(control: Database[dict[str, Any]]) -> None:
    """Ensure that the capped collection exists and is not empty: on any other, a tailable cursor dies at once."""
    wakeups = control["wakeups"]
    try:
        control.create_collection("wakeups", capped=True, size=WAKEUPS_BYTES)
    except CollectionInvalid:
        if not wakeups.options().get("capped"):
            # Somebody has dropped it, and the next wakeup created one that is not capped.
            with suppress(OperationFailure):  # another process was quicker
                control.command("convertToCapped", "wakeups", size=WAKEUPS_BYTES)
    except OperationFailure as error:
        if error.code != _NAMESPACE_EXISTS:  # another process was quicker
            raise
    if wakeups.find_one({}, {"_id": True}) is None:
        wakeups.insert_one({})
