"""The two databases: the client, the collections, and what the driver's errors mean.

Users' documents live in the database that `MONGO_URI` names; jobs, ranges and the rest live in the control database,
so that no line of a file can become a job. Build a Store after the fork, never before: a client does not survive one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, cast

from bson import Int64, ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import InvalidBSON, InvalidId
from dns.exception import DNSException
from dns.exception import Timeout as DNSTimeout
from dns.resolver import NoNameservers
from pymongo import DeleteOne, InsertOne, MongoClient, ReadPreference, UpdateOne, WriteConcern
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
    WTimeoutError,
)
from pymongo.read_concern import ReadConcern

from engine.control.schema import prepare
from engine.control.waits import Waits
from engine.errors import AccessDenied, HeadraceError, NotFound, Permanent, Refused, StartError, Transient
from engine.settings import Settings

__all__ = [
    "DUPLICATE_KEY",
    "TRANSIENT_CODES",
    "Document",
    "Store",
    "claims_of",
    "delete_slices",
    "described",
    "indexes_of",
    "job_key",
    "jobs_of",
    "leniently",
    "literals",
    "parse_id",
    "ranges_of",
    "rejects_of",
    "translate",
    "translated",
    "with_ticket",
    "write_all",
]

Document = dict[str, Any]

TRANSIENT_CODES: Final = frozenset(
    # The network, shutdowns, elections, interruptions, time limits.
    {6, 7, 24, 50, 64, 79, 83, 89, 90, 91, 133, 134, 189, 202, 216, 237, 262, 279, 281, 290, 310, 317, 355, 358, 384}
    | {407, 453, 9001, 10058, 10107, 11600, 11601, 11602, 13435, 13436, 46841, 91331, 10045600}
    # Locks, snapshots, cursors, and other conflicts with concurrent operations.
    | {43, 46, 107, 112, 117, 136, 175, 215, 217, 239, 246, 267, 314, 363, 412, 12586, 12587, 50915}
    # Routers and shards while data moves, or while they find out where it is.
    | {63, 70, 82, 145, 149, 150, 199, 203, 211, 249, 250, 272, 319, 338, 342, 343, 406, 9996, 13388, 56846}
    # Overload, a lack of memory or disk, or writes that somebody has blocked for a while.
    | {146, 264, 365, 371, 402, 433, 449, 450, 462, 14031}
)
"""Error codes of temporary trouble, as when a server starts, stops, holds an election or is overloaded. They come for a
whole command or, from a router, for each document of a shard in trouble: such a document is written again, and never
rejected. (388, a transaction too large for the cache, is left out: it is the fault of a single document with too many
index keys.)

Chosen from MongoDB's src/mongo/base/error_codes.yml, 6.0 and later.
"""

SLICE: Final = 5000
"""Documents that `delete_slices` deletes per command: a job may have millions, and a command has to end in time."""

_TRANSIENT_LABELS: Final = frozenset({"RetryableWriteError", "RetryableError", "SystemOverloadedError"})

DUPLICATE_KEY: Final = 11000

_ATLAS: Final = 8000
"""Error code of what Atlas adds to MongoDB, such as quotas."""

_DENIED_CODES: Final = frozenset({13, 18, 33})
"""Unauthorized, AuthenticationFailed, PrivilegeNotFound."""


class Store:
    """A client and the collections of Headrace.

    Args:
        settings: `mongo_uri` must be set.
        pool: the most connections that this process may hold.
        moved: called in the thread that sends a command, when it is sent and when it is answered.
    """

    def __init__(self, settings: Settings, pool: int = 16, moved: Callable[[], None] | None = None) -> None:
        if settings.mongo_uri is None:
            raise StartError("MONGO_URI is not set: set it to the MongoDB for the queue and the documents")
        self._waits = Waits(moved or (lambda: None))
        concern = WriteConcern(w="majority", wtimeout=int(settings.write_timeout_seconds * 1000))
        try:
            self.client: MongoClient[Document] = MongoClient(
                settings.mongo_uri.get_secret_value(),
                appname="headrace",
                tz_aware=True,
                maxPoolSize=pool,
                connectTimeoutMS=int(settings.select_timeout_seconds * 1000),
                serverSelectionTimeoutMS=int(settings.select_timeout_seconds * 1000),
                # When polled, a server that says it is shutting down or stepping down is checked again at once;
                # streaming would exclude it until its next update, up to ten seconds later.
                serverMonitoringMode="poll",
                event_listeners=[self._waits] if moved is not None else [],
                socketTimeoutMS=int(settings.socket_timeout_seconds * 1000),
                # Set in MONGO_URI, it would override these timeouts, and may be longer than the watchdog allows.
                timeoutMS=None,
                minPoolSize=0,
                retryWrites=True,
                w="majority",
            )
        except (PyMongoError, ValueError) as error:
            # The error's text may quote the URI, and with it a password.
            if isinstance(error.__context__, DNSTimeout | NoNameservers):
                raise Transient(
                    "DNS does not answer for the name in MONGO_URI: make sure its servers are reachable"
                ) from None
            mend = "write it as mongodb://host:port/database, with options that go together"
            if isinstance(error.__context__, DNSException):
                mend = "the hosts behind its name could not be looked up: check the name, and that DNS answers"
            raise StartError(f"MONGO_URI cannot be used ({type(error).__name__}): {mend}") from None
        codec: CodecOptions[Document] = CodecOptions(tz_aware=True)

        def database(name: str) -> Database[Document]:
            # Whatever MONGO_URI asks for: a lagging member may lack the write that a decision here depends on.
            return self.client.get_database(name, codec, ReadPreference.PRIMARY, concern, ReadConcern("local"))

        self.data: Database[Document] = database(settings.data_db())
        self.control: Database[Document] = database(settings.engine_control_db)
        self.jobs: Collection[Document] = self.control["jobs"]
        self.ranges: Collection[Document] = self.control["ranges"]
        self.sources: Collection[Document] = self.control["sources"]
        self.rejects: Collection[Document] = self.control["rejects"]
        self.workers: Collection[Document] = self.control["workers"]
        # Nothing depends on a wakeup that is lost, so it does not wait for a majority.
        self.wakeups: Collection[Document] = self.control["wakeups"].with_options(write_concern=WriteConcern(1))
        self.batches: Collection[Document] = self.control["batches"]
        self.switches: Collection[Document] = self.control["switches"]
        self.totals: Collection[Document] = self.control["totals"]
        self.uploads: Collection[Document] = self.control["uploads"]
        self.claims: Collection[Document] = self.control["claims"]
        self.requests: Collection[Document] = self.control["requests"]

    def prepare(self) -> None:
        """Create what is missing in the control database. Safe for anyone to repeat, at any time.

        Raises:
            StartError: the control database was written by a newer version, or MongoDB is too old.
            AccessDenied: the user in `mongo_uri` may not do this.
            Transient: the database does not answer.
        """
        with translated("preparing the control database"):
            prepare(self.control)

    def standalone(self) -> bool:
        """Whether the server is neither in a replica set nor a router: such a server takes no retryable writes."""
        with translated("checking its health"):
            hello = self.control.command("hello")
        return "setName" not in hello and hello.get("msg") != "isdbgrid"

    def wake(self) -> None:
        """Make idle workers look at the queue now. Errors are ignored: they look a little later anyway."""
        with suppress(HeadraceError), translated("waking the workers"):
            self.wakeups.insert_one({})

    def ping(self) -> None:
        """Raises Transient or AccessDenied unless a primary answers."""
        with translated("checking its health"):
            self.control.command("ping")

    def waited(self) -> float:
        """Seconds that this thread has waited for connections and answers so far; always 0 unless `moved` was given."""
        return self._waits.waited

    def round_trip(self) -> float:
        """Seconds of a round trip to MongoDB, however busy the server is: the time of the fastest recent answer. 0 if
        not known; always 0 unless `moved` was given."""
        return self._waits.answers.seconds()

    def close(self) -> None:
        """Close the client's connections."""
        self.client.close()


def leniently(database: Database[Document]) -> Database[Document]:
    """The same database, for reading what others stored: dates beyond Python's range, strings that are not UTF-8."""
    return database.with_options(codec_options=_lenient(database))


def _lenient(database: Database[Document]) -> CodecOptions[Document]:
    return database.codec_options.with_options(
        datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
    )


def described(database: Database[Document], name: str) -> Document | None:
    """A collection as `listCollections` returns it; None if there is none. Raises PyMongoError."""
    try:
        return cast("Document | None", next(iter(database.list_collections(filter={"name": name})), None))
    except InvalidBSON:
        # Its validator has a date beyond Python's range. Only as a raw command, which the driver does not retry, does
        # this take codec options.
        answer = database.command("listCollections", filter={"name": name}, codec_options=_lenient(database))
        return next(iter(answer["cursor"]["firstBatch"]), None)


def indexes_of(database: Database[Document], name: str) -> list[Document]:
    """The indexes of a collection as `listIndexes` returns them. Raises PyMongoError."""
    try:
        return [dict(index) for index in database[name].list_indexes()]
    except InvalidBSON:  # the filter of a partial index has a date beyond Python's range
        return list(database.command("listIndexes", name, codec_options=_lenient(database))["cursor"]["firstBatch"])


def job_key(job_id: str) -> ObjectId:
    """The `_id` of a job. Raises NotFound if `job_id` is not 24 hexadecimal digits."""
    return parse_id(job_id, "job")


def parse_id(text: str, what: str) -> ObjectId:
    """The `_id` that `text` spells. Raises NotFound, naming `what` it is of, if it is not 24 hexadecimal digits."""
    try:
        return ObjectId(text)
    except (InvalidId, TypeError):
        raise NotFound(f"there is no {what} {text[:64]!r}: its id has 24 hexadecimal digits") from None


def ranges_of(job: ObjectId) -> Document:
    """Matches all ranges of a job by the bounds of their `_id`, so that the index scan covers just these."""
    return {"_id": {"$gte": {"job": job, "index": 0}, "$lt": {"job": job, "index": float("inf")}}}


def jobs_of(batch: ObjectId) -> Document:
    """Matches the jobs of a batch. `$type` lets the server use the partial index on jobs that have a batch."""
    return {"batch": {"$eq": batch, "$type": "objectId"}}


def with_ticket(key: str) -> Document:
    """Matches what was submitted with this idempotency key. `$type` lets the server use the partial index on keys."""
    return {"ticket.key": {"$eq": key, "$type": "string"}}


def rejects_of(job: ObjectId) -> Document:
    """Matches all rejects of a job by the bounds of their `_id`; sorted by it, they are in file order."""
    first, last = ({"job": job, "offset": Int64(offset)} for offset in (0, 2**63 - 1))
    return {"_id": {"$gte": first, "$lte": last}}


def literals(fields: Mapping[str, object]) -> Document:
    """Fields for an update pipeline, wrapped so that a string beginning with `$` is not taken for an expression."""
    return {name: {"$literal": value} for name, value in fields.items()}


def claims_of(job: ObjectId) -> Document:
    """Matches all keys claimed by the dry run of a job, by the bounds of their `_id`."""
    return {"_id": {"$gte": {"job": job, "what": ""}, "$lt": {"job": job, "what": []}}}


def translate(error: PyMongoError, doing: str) -> HeadraceError:
    """The project's error for one of the driver's; `doing` says what was being done."""
    # The driver also raises private subclasses: name the nearest public class.
    name = next(kind.__name__ for kind in type(error).__mro__ if not kind.__name__.startswith("_"))
    if isinstance(error, ServerSelectionTimeoutError):
        return Transient(
            f"MongoDB does not answer while {doing}: make sure it is running, and that MONGO_URI has its address, "
            "replica set and TLS options"
        )
    if isinstance(error, WTimeoutError | WriteConcernError):
        return Transient(
            f"a majority did not confirm in time while {doing} (code {error.code}), which may have worked all the "
            "same: make sure enough members of the replica set are up"
        )
    if isinstance(error, ConnectionFailure | ExecutionTimeout):
        return Transient(f"the connection to MongoDB failed while {doing} ({name}): make sure it is running")
    if isinstance(error, OperationFailure):
        if error.code in TRANSIENT_CODES or any(map(error.has_error_label, _TRANSIENT_LABELS)):
            return Transient(f"MongoDB could not answer while {doing} (code {error.code}): check its members")
        if error.code in _DENIED_CODES:
            return AccessDenied(
                f"MongoDB does not allow {doing} (code {error.code}): check the user in MONGO_URI and its roles"
            )
        detail = str((error.details or {}).get("errmsg", ""))[:500]
        if error.code == _ATLAS:
            return AccessDenied(f"MongoDB Atlas does not allow {doing}: {detail}")
        return Permanent(f"MongoDB refused a command while {doing} (code {error.code}): {detail}")
    if isinstance(error, ConfigurationError):
        return Refused(f"MongoDB cannot be used for {doing} ({name}): check MONGO_URI")
    return Transient(f"MongoDB failed while {doing} ({name}): see its log")


def write_all(
    collection: Collection[Document], writes: Sequence[InsertOne[Document] | UpdateOne | DeleteOne]
) -> Document:
    """Send writes together. Those that violate a unique index are skipped; the others are acknowledged on return.

    Returns the driver's result: the count `nMatched`, and the lists `upserted` and `writeErrors`, whose entries have
    the `index` of their write.

    Raises:
        PyMongoError: any other error; `translated` turns it into the project's own.
    """
    try:
        return collection.bulk_write(writes, ordered=False).bulk_api_result
    except BulkWriteError as error:
        if concerns := error.details.get("writeConcernErrors"):
            raise WriteConcernError("a majority did not confirm the write", concerns[0].get("code")) from None
        for fault in error.details["writeErrors"]:
            if fault["code"] != DUPLICATE_KEY:
                raise OperationFailure(fault["errmsg"], fault["code"], fault) from None
        return dict(error.details)


def delete_slices(collection: Collection[Document], query: Document, goes_on: Callable[[], bool]) -> bool:
    """Delete the documents of a range of `_id`s, `SLICE` with each command. Returns True when all are deleted, False if
    `goes_on`, asked between two commands, returned False. Raises PyMongoError."""
    while True:
        last = next(collection.find(query, {"_id": 1}).sort("_id", 1).skip(SLICE - 1).limit(1), None)
        collection.delete_many(query if last is None else {"_id": query["_id"] | {"$lte": last["_id"]}})
        if last is None:
            return True
        if not goes_on():
            return False


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn the driver's errors within it into the project's own; `doing` says in their message what was being done."""
    try:
        yield
    except PyMongoError as error:
        raise translate(error, doing) from error
