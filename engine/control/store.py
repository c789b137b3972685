"""The two databases: the client, the collections, and what errors of the driver mean.

Documents of users live in the database that `MONGO_URI` names; jobs, ranges and the rest live in the control database,
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
    # Locks, snapshots, cursors, and what else of the same time is in the way.
    | {43, 46, 107, 112, 117, 136, 175, 215, 239, 246, 267, 314, 363, 412, 12586, 12587, 50915}
    # Routers and shards while data moves, or while they learn where it is.
    | {63, 70, 82, 145, 149, 150, 199, 203, 211, 249, 250, 272, 319, 338, 342, 343, 406, 9996, 13388, 56846}
    # Too much load, no room, or writes that somebody has blocked for a while.
    | {146, 264, 365, 371, 402, 433, 449, 450, 462, 14031}
)
"""Codes of passing trouble: a server that starts, stops, elects or is overloaded. They come for a whole command or, from a
router, for each document of a shard in trouble: such a document is written again, and never rejected. (388, a transaction too
large for the cache, is not among them: that is the fault of a single document with too many index keys.)

Of the codes in MongoDB's src/mongo/base/error_codes.yml, from 6.0 on.
"""

SLICE: Final = 5000
"""Rejects, or keys of a dry run, that one command deletes: of one job there may be millions, and a command has to end in time."""

_TRANSIENT_LABELS: Final = frozenset({"RetryableWriteError", "RetryableError", "SystemOverloadedError"})

DUPLICATE_KEY: Final = 11000

_ATLAS: Final = 8000
"""What Atlas adds to MongoDB, as quotas, answers with this."""

_DENIED_CODES: Final = frozenset({13, 18, 33})


class Store:
    """A client and the collections of Headrace.

    Args:
        settings: `mongo_uri` must be set.
        pool: the most connections that this process may hold.
        moved: called in the thread that sends a command, when it is sent and when it is answered.
    """

    def __init__(self, settings: Settings, pool: int = 16, moved: Callable[[], None] | None = None) -> None:
        if settings.mongo_uri is None:
            raise StartError("MONGO_URI is not set: name the MongoDB that keeps the queue and takes the documents")
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
                # A server that says that it stops or steps down is asked again at once; a stream would leave it out for ten
                # seconds, until its next word.
                serverMonitoringMode="poll",
                event_listeners=[self._waits] if moved is not None else [],
                socketTimeoutMS=int(settings.socket_timeout_seconds * 1000),
                # It would take the place of both of these, and may be longer than the watchdog waits.
                timeoutMS=None,
                minPoolSize=0,
                retryWrites=True,
                w="majority",
            )
        except (PyMongoError, ValueError) as error:
            # The text of the error may quote the URI, and with it a password.
            if isinstance(error.__context__, DNSTimeout | NoNameservers):
                raise Transient(
                    "DNS does not answer for the name in MONGO_URI: see that its servers can be reached"
                ) from None
            mend = "write it as mongodb://host:port/database, with options that belong together"
            if isinstance(error.__context__, DNSException):
                mend = (
                    "the hosts behind its name could not be looked up: see that the name is right and that DNS answers"
                )
            raise StartError(f"MONGO_URI cannot be used ({type(error).__name__}): {mend}") from None
        codec: CodecOptions[Document] = CodecOptions(tz_aware=True)

        def database(name: str) -> Database[Document]:
            # Whatever MONGO_URI asks for: a member that lags knows nothing of the write that a decision here depends on.
            return self.client.get_database(name, codec, ReadPreference.PRIMARY, concern, ReadConcern("local"))

        self.data: Database[Document] = database(settings.data_db())
        self.control: Database[Document] = database(settings.engine_control_db)
        self.jobs: Collection[Document] = self.control["jobs"]
        self.ranges: Collection[Document] = self.control["ranges"]
        self.sources: Collection[Document] = self.control["sources"]
        self.rejects: Collection[Document] = self.control["rejects"]
        self.workers: Collection[Document] = self.control["workers"]
        # Nothing depends on one that is lost: it is not waited for until a majority has it.
        self.wakeups: Collection[Document] = self.control["wakeups"].with_options(write_concern=WriteConcern(1))
        self.batches: Collection[Document] = self.control["batches"]
        self.switches: Collection[Document] = self.control["switches"]
        self.totals: Collection[Document] = self.control["totals"]
        self.uploads: Collection[Document] = self.control["uploads"]
        self.claims: Collection[Document] = self.control["claims"]
        self.requests: Collection[Document] = self.control["requests"]

    def prepare(self) -> None:
        """Make what the control database needs where it is missing; safe to repeat by anyone at any time.

        Raises:
            StartError: the control database was written by a newer version, or MongoDB is too old.
            AccessDenied: the user in `mongo_uri` may not.
            Transient: the database does not answer.
        """
        with translated("preparing the control database"):
            prepare(self.control)

    def standalone(self) -> bool:
        """Whether the server is neither a member of a replica set nor a router: it takes no retryable writes."""
        with translated("checking its health"):
            hello = self.control.command("hello")
        return "setName" not in hello and hello.get("msg") != "isdbgrid"

    def wake(self) -> None:
        """Make idle workers look at the queue now. Where that fails they look a little later: whoever made a job, made it."""
        with suppress(HeadraceError), translated("waking the workers"):
            self.wakeups.insert_one({})

    def ping(self) -> None:
        """Raises Transient or AccessDenied unless a primary answers."""
        with translated("checking its health"):
            self.control.command("ping")

    def waited(self) -> float:
        """Seconds that this thread has waited for connections and answers so far; counted where `moved` was given."""
        return self._waits.waited

    def round_trip(self) -> float:
        """Seconds that the way to MongoDB and back takes: the shortest answer of late, however busy the server is. 0 where it is
        not known; counted where `moved` was given."""
        return self._waits.answers.seconds()

    def close(self) -> None:
        """Close the client's connections."""
        self.client.close()


def leniently(database: Database[Document]) -> Database[Document]:
    """The same database, to read what others have stored: dates that Python has not, and strings that are no UTF-8."""
    return database.with_options(codec_options=_lenient(database))


def _lenient(database: Database[Document]) -> CodecOptions[Document]:
    return database.codec_options.with_options(
        datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
    )


def described(database: Database[Document], name: str) -> Document | None:
    """A collection as `listCollections` has it; None where there is none. Raises PyMongoError."""
    try:
        return cast("Document | None", next(iter(database.list_collections(filter={"name": name})), None))
    except InvalidBSON:
        # Its validator names a date that Python has not. The driver takes no options for this command but here, where it does
        # not repeat it.
        answer = database.command("listCollections", filter={"name": name}, codec_options=_lenient(database))
        return next(iter(answer["cursor"]["firstBatch"]), None)


def indexes_of(database: Database[Document], name: str) -> list[Document]:
    """The indexes of a collection as `listIndexes` has them. Raises PyMongoError."""
    try:
        return [dict(index) for index in database[name].list_indexes()]
    except InvalidBSON:  # of a partial index: likewise
        return list(database.command("listIndexes", name, codec_options=_lenient(database))["cursor"]["firstBatch"])


def job_key(job_id: str) -> ObjectId:
    """The `_id` of a job. Raises NotFound where `job_id` is not 24 hexadecimal digits."""
    return parse_id(job_id, "job")


def parse_id(text: str, what: str) -> ObjectId:
    """The `_id` of a thing. Raises NotFound where `text` is not 24 hexadecimal digits."""
    try:
        return ObjectId(text)
    except (InvalidId, TypeError):
        raise NotFound(f"there is no {what} {text[:64]!r}: its id has 24 hexadecimal digits") from None


def ranges_of(job: ObjectId) -> Document:
    """Matches all ranges of a job, by the bounds of their `_id`: an index scan of just these."""
    return {"_id": {"$gte": {"job": job, "index": 0}, "$lt": {"job": job, "index": float("inf")}}}


def jobs_of(batch: ObjectId) -> Document:
    """Matches the jobs of a batch. The type is what lets the server use the index, which is of jobs that have a batch."""
    return {"batch": {"$eq": batch, "$type": "objectId"}}


def with_ticket(key: str) -> Document:
    """Matches what was submitted with this idempotency key; of the type, as in `jobs_of`."""
    return {"ticket.key": {"$eq": key, "$type": "string"}}


def rejects_of(job: ObjectId) -> Document:
    """Matches all rejects of a job, by the bounds of their `_id`; in the order of that they are in the order of the file."""
    first, last = ({"job": job, "offset": Int64(offset)} for offset in (0, 2**63 - 1))
    return {"_id": {"$gte": first, "$lte": last}}


def literals(fields: Mapping[str, object]) -> Document:
    """Fields as an update with a pipeline sets them, where a value that begins with $ would be an expression."""
    return {name: {"$literal": value} for name, value in fields.items()}


def claims_of(job: ObjectId) -> Document:
    """Matches all keys that the dry run of a job has claimed, by the bounds of their `_id`."""
    return {"_id": {"$gte": {"job": job, "what": ""}, "$lt": {"job": job, "what": []}}}


def translate(error: PyMongoError, doing: str) -> HeadraceError:
    """The project's error for one of the driver's; `doing` says what was being done."""
    # Of the driver's own classes that nobody is meant to see, the one that is.
    name = next(kind.__name__ for kind in type(error).__mro__ if not kind.__name__.startswith("_"))
    if isinstance(error, ServerSelectionTimeoutError):
        return Transient(
            f"MongoDB does not answer while {doing}: see that it runs and that MONGO_URI names it, with its replica set and TLS "
            "as they are"
        )
    if isinstance(error, WTimeoutError | WriteConcernError):
        return Transient(
            f"a majority did not confirm in time while {doing} (code {error.code}), which may be done all the same: see that "
            "enough members of the replica set are up"
        )
    if isinstance(error, ConnectionFailure | ExecutionTimeout):
        return Transient(f"the connection to MongoDB failed while {doing} ({name}): see that it runs")
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
        return Permanent(f"MongoDB refused {doing} (code {error.code}): {detail}")
    if isinstance(error, ConfigurationError):
        return Refused(f"MongoDB cannot be used for {doing} ({name}): check MONGO_URI")
    return Transient(f"MongoDB failed while {doing} ({name}): see its log")


def write_all(
    collection: Collection[Document], writes: Sequence[InsertOne[Document] | UpdateOne | DeleteOne]
) -> Document:
    """Send writes together. Those that violate a unique index are skipped; the others are acknowledged on return.

    Returns the driver's account of it: `nMatched`, `upserted` and `writeErrors`, with the `index` of each.

    Raises:
        PyMongoError: within `translated`, it comes out as the project's own.
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
    """Delete the documents of a range of `_id`s, so many with each command; returns whether all are, or `goes_on`, which is
    asked between two of them, said no. Raises PyMongoError."""
    while True:
        last = next(collection.find(query, {"_id": 1}).sort("_id", 1).skip(SLICE - 1).limit(1), None)
        collection.delete_many(query if last is None else {"_id": query["_id"] | {"$lte": last["_id"]}})
        if last is None:
            return True
        if not goes_on():
            return False


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Within it, errors of the driver come out as the project's own."""
    try:
        yield
    except PyMongoError as error:
        raise translate(error, doing) from error
