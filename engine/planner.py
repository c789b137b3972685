"""Decide, once, how a job is loaded: its format, the tag of its ids, its ranges.

Anyone may plan a job at any time and as often as they like: the first compare-and-set holds, and the others follow it.
"""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

from bson import Binary, ObjectId
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import DuplicateKeyError

from engine.decode import BOM
from engine.errors import HeadraceError, Refused, Transient
from engine.jobs import same_source
from engine.ledger import Ledger
from engine.logs import expected
from engine.model import ByteRange, Format, Job, JobState, Lease, Plan, Source
from engine.objects import Objects
from engine.plans import Plans
from engine.queue import Queue
from engine.ranges import count, cut
from engine.settings import Settings
from engine.steps import Step, reach
from engine.store import Document, Store, job_key, translated, write_all

__all__ = ["SMALL_BYTES", "Planner", "Prepared", "decide"]

SNIFF_BYTES: Final = 64 * 1024
"""How much of an object is looked at before it is loaded."""

BLANK_BYTES: Final = 4 * 1024 * 1024
"""How much of an object is looked at whose beginning is all blank."""

SMALL_BYTES: Final = 256 * 1024
"""An object that is no larger is read at once, when it is looked at."""

READERS: Final = 16
"""Objects that are looked at side by side: as many as are planned together, so that none waits for one that hangs."""

UNREGISTERED: Final = bytes(6)
"""The tag of a source that nobody has loaded; no document carries it."""

LOOK_SHARE: Final = 0.5
"""Of a lease's time: for so long S3 may take to show the beginnings of objects; jobs of which it has not by then wait."""

RANGES_PER_WORKER: Final = 4
"""So many, that the last ones to finish leave the others idle for a short time only."""

SMALL_RANGE_BYTES: Final = 8 * 1024 * 1024
"""A range is not made smaller than this only to have more of them: each costs a request and a few writes."""

MAX_RANGES: Final = 100_000
"""Ranges of one object, whatever the settings: each is a document, and they are summed once a second."""

TAG_DRAWS: Final = 64
"""Random tags tried for one second before the next second is taken."""

WIDE_SAMPLE: Final = 4096
"""Bytes that tell whether a text is UTF-16 or UTF-32."""

_NDJSON_SUFFIXES: Final = (".ndjson", ".jsonl", ".json")
_TEXT_SUFFIXES: Final = (".txt", ".log")
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "a zip archive",
    b"\x04\x22\x4d\x18": "LZ4",
}


_BZIP2: Final = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
_PRETTY: Final = re.compile(rb"\s*\{[ \t\r]*\n")


def decide(asked: Format, key: str, head: bytes) -> Format:
    """The format of an object whose first bytes are `head`.

    Raises:
        Refused: it is not a text of lines, or it is JSON that is not newline-delimited.
    """
    kinds = [name for magic, name in _COMPRESSED.items() if head.startswith(magic)]
    if kinds := kinds or ["bzip2"] * bool(_BZIP2.match(head)):
        raise Refused(f"{key} is compressed ({kinds[0]}): decompress it before you upload it")
    # A UTF-16 or UTF-32 text has a mark at its start, or a NUL in each character of a plain line.
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")) or _looks_wide(head):
        raise Refused(f"{key} looks like UTF-16 or UTF-32: convert it to UTF-8, for example with iconv")
    if asked is not Format.AUTO:
        return asked
    name = key.lower()
    first = _begins(head)
    if name.endswith(_TEXT_SUFFIXES):
        return Format.TEXT
    if not name.endswith((".ndjson", ".jsonl")) and (first == b"[" or _PRETTY.match(head.removeprefix(BOM))):
        what = "one JSON array" if first == b"[" else "one JSON document over many lines"
        raise Refused(
            f"{key} begins like {what} and not with one document a line: write a document to each line, "
            'or say {"format": "ndjson"} or {"format": "text"} if it is right as it is'
        )
    if name.endswith(_NDJSON_SUFFIXES) or first == b"{":
        return Format.NDJSON
    return Format.TEXT


def _begins(head: bytes) -> bytes:
    """The first byte that is not blank; none where all are."""
    return head.removeprefix(BOM).lstrip()[:1]


def _looks_wide(head: bytes) -> bool:
    """Whether it looks like a text of two or four bytes a character: where it has much ASCII, the high bytes are NUL, and the
    low ones hardly ever. NULs in a row are none of that: a log that was cut while it was written has them."""
    sample = head[: min(WIDE_SAMPLE, len(head)) // 4 * 4]
    half, quarter = len(sample) // 2, len(sample) // 4
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if half >= 4 and max(even, odd) >= 0.4 * half and min(even, odd) <= 0.1 * half:
        return True
    fewest, *others = sorted(sample[at::4].count(0) for at in range(4))
    return half >= 4 and min(others) >= 0.4 * quarter and fewest <= 0.1 * quarter


@dataclass(frozen=True, slots=True)
class _Registered:
    tag: bytes
    sole: bool
    completed_by: str | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that was planned, perhaps a lease on its only range, and what was read of the object's beginning; or the error
    because of which it could not be planned."""

    job: Job
    lease: Lease | None = None
    head: bytes = b""
    error: HeadraceError | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job whose object has been looked at."""

    job: Job
    head: bytes
    format: Format


class Planner:
    """Plans jobs.

    Args:
        store, queue, plans, ledger, objects: where things are.
        settings: `engine_range_bytes` is the most that one range of a new plan holds; an object is cut so that each of
            `engine_workers` gets several ranges, unless these were tiny.
        moved: called while S3 is waited for, within a bound.
    """

    def __init__(
        self,
        store: Store,
        queue: Queue,
        plans: Plans,
        ledger: Ledger,
        objects: Objects,
        settings: Settings,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._data = store.data
        self._sources = store.sources
        self._wake = store.wake
        self._queue = queue
        self._plans = plans
        self._ledger = ledger
        self._objects = objects
        self._range_bytes = settings.engine_range_bytes
        self._max_line_bytes = settings.engine_max_line_bytes
        self._shares = RANGES_PER_WORKER * settings.engine_workers
        self._look_seconds = LOOK_SHARE * settings.engine_lease_seconds
        self._moved = moved
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="planner")

    def close(self) -> None:
        """Let the threads end."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def prepare(self, jobs: Sequence[Job], holder: str) -> list[Prepared]:
        """Plan PENDING jobs, and lease the ranges of those that have but one; whoever is quicker plans a job.

        Each step is one command for all of them, and their objects are looked at side by side: what a small job waits for is
        the database's journal and S3's first byte. Nothing is told of a job whose turn to be looked at did not come: it is
        given back, for anyone to plan.

        Raises:
            Transient, Final: of MongoDB; some of the jobs may be planned. What is wrong with one job or its object is told in
                what is returned of it.
        """
        done: list[Prepared] = []
        drafts: list[_Draft] = []
        unseen: list[Job] = []
        for job, looked in zip(jobs, self._looks(jobs), strict=True):
            if isinstance(looked, _Draft):
                drafts.append(looked)
            elif looked is None:
                unseen.append(job)
            else:
                done.append(Prepared(job, error=looked))
        if unseen:
            self._plans.release_claims(unseen, holder)
        plans: list[tuple[Job, Plan, str | None]] = []
        for draft, source in zip(drafts, self._register(drafts), strict=True):
            job, plan = draft.job, self._plan(draft, source)
            skip = job.options.if_loaded == "skip" and not job.options.validate
            if plan.range_count == 0 or (source.completed_by and skip):
                self._plans.complete_unread(job, plan, source.completed_by)
                done.append(Prepared(self._queue.get(job.id)))
            else:
                plans.append((job, plan, source.completed_by))
        reach(Step.PLAN)
        planned = {job.id: job for job in self._plans.fix(plans)}
        heads = {draft.job.id: draft.head for draft in drafts}
        single: dict[str, ByteRange] = {}
        for before, plan, _ in plans:
            job = planned.get(before.id, before)
            holds = job.plan if job.state is JobState.PROCESSING and job.stopping is None else None
            if holds is not None and holds.range_count == 1:
                single[job.id] = cut(job.source.size, 1, 0)
                continue
            if holds == plan:
                self._queue.open_ranges(job)
                self._wake()  # the others have looked already, and found nothing to lease
            done.append(Prepared(job, None, heads[job.id]))
        if single:
            reach(Step.PLANNED)
            leases = self._ledger.open_leased(single, holder)
            done += [Prepared(planned[id], leases.get(id), heads[id]) for id in single]
        return done

    def _looks(self, jobs: Sequence[Job]) -> "list[_Draft | HeadraceError | None]":
        """Look at all of them. One that S3 does not show in time must not hold up the others, nor this worker. None for those
        that were not asked for at all: what hangs of earlier looks has all the threads."""
        looks = [self._readers.submit(self._look, job) for job in jobs]
        end = time.monotonic() + self._look_seconds
        waiting = set(looks)
        while waiting and (left := end - time.monotonic()) > 0:
            _, waiting = wait(waiting, min(left, 1))
            self._moved()
        late = Transient(
            f"S3 did not show the beginning of the object within {self._look_seconds:g} seconds: it is busy or hangs"
        )
        never = {look for look in waiting if look.cancel()}
        return [None if look in never else late if look in waiting else look.result() for look in looks]

    def _look(self, job: Job) -> "_Draft | HeadraceError":
        """The beginning of a job's object, all of it where that is small, and the format that it has."""
        try:
            with expected(f"looking at {job.source.key}"):
                head = b""
                if size := job.source.size:
                    size = min(size, SMALL_BYTES if size <= SMALL_BYTES else SNIFF_BYTES)
                    head = self._head(job.source, size)
                    if job.options.format is Format.AUTO and size < job.source.size and not _begins(head):
                        # The first byte that is not blank decides, in small objects and in large ones.
                        head = self._head(job.source, min(job.source.size, BLANK_BYTES))
                return _Draft(job, head, decide(job.options.format, job.source.key, head))
        except HeadraceError as error:
            return error

    def _head(self, source: Source, size: int) -> bytes:
        """The first bytes of an object. A second try is for a connection that S3 had closed: it is worth no wait of the job."""
        for last in (False, True):
            try:
                with self._objects.open(source, 0, size) as reader:
                    return reader.read(size)
            except Transient:
                if last:
                    raise
        raise AssertionError  # the last try returns or raises

    def _plan(self, draft: _Draft, source: _Registered) -> Plan:
        size = draft.job.source.size
        share = max(-(-size // self._shares), SMALL_RANGE_BYTES)
        range_bytes = max(min(self._range_bytes, share), -(-size // MAX_RANGES))
        return Plan(draft.format, source.tag, range_bytes, count(size, range_bytes), source.sole, self._max_line_bytes)

    def _register(self, drafts: Sequence[_Draft]) -> list[_Registered]:
        """Hold the source of each job to one tag, and learn who has loaded it into this collection before."""
        new = {
            draft.job.id: _new(draft.job)
            for draft in drafts
            if not (draft.job.options.force or draft.job.options.validate)
        }
        ours: set[str] = set()
        if new:
            writes = [
                UpdateOne(
                    _identity(draft.job, draft.format) | {"generation": 0},
                    {"$setOnInsert": new[draft.job.id]},
                    upsert=True,
                )
                for draft in drafts
                if draft.job.id in new
            ]
            with translated("registering sources"):
                made = {entry["index"] for entry in write_all(self._sources, writes)["upserted"]}
            ours = {id for index, id in enumerate(new) if index in made}
        return [
            _Registered(bytes(new[draft.job.id]["tag"]), True, self._loaded_before(draft.job, draft.format))
            if draft.job.id in ours
            else self._known(draft.job, draft.format)
            if draft.job.options.validate
            else self._registered(draft.job, draft.format)
            for draft in drafts
        ]

    def _registered(self, job: Job, format: Format) -> _Registered:
        """As `_register`, for one job whose source may be there already."""
        with translated("registering a source"):
            found = self._forced(job, format) if job.options.force else self._found_or_made(job, format, 0, None)
            if _entry(found, job) is None:
                unknown = {"_id": found["_id"], "loads": {"$not": {"$elemMatch": _place(job)}}}
                self._sources.update_one(unknown, {"$push": {"loads": _load(job)}})
                found = self._sources.find_one({"_id": found["_id"]}) or found
        entry = _entry(found, job)
        assert entry is not None  # it was there, or has just been pushed
        if entry["firstJob"] == job_key(job.id):
            return _Registered(bytes(found["tag"]), True, self._loaded_before(job, format))
        # What was loaded may have been deleted since: then again there is nothing that a duplicate could be of.
        sole = self._is_empty(job) and not self._queue.loads.others_may_load(job, format)
        return _Registered(bytes(found["tag"]), sole, self._loaded_by(job, format))

    def _is_empty(self, job: Job) -> bool:
        """Whether the collection that a job loads into holds no document."""
        with translated("looking into the collection"):
            return self._data[job.options.collection].find_one({}, {"_id": 1}) is None

    def _loaded_before(self, job: Job, format: Format) -> str | None:
        """As `_loaded_by`, of a source that only `force` can have loaded here: asked where it matters, by `skip`."""
        asked = job.options.if_loaded == "skip" and not job.options.force
        return self._loaded_by(job, format) if asked else None

    def _loaded_by(self, job: Job, format: Format) -> str | None:
        """The latest job that has loaded this source, of any generation, into the same collection, its history kept or not."""
        if kept := self._queue.loads.loaded_by(job, format):
            return kept
        with translated("looking for earlier loads"):
            found = list(self._sources.find(_identity(job, format), {"loads": True}))
        entries = (_entry(source, job) or {} for source in found)
        pruned = [entry["completedBy"] for entry in entries if entry.get("completedBy")]
        return str(max(pruned)) if pruned else None

    def _known(self, job: Job, format: Format) -> _Registered:
        """What is known of the source of a job that writes nothing, which leaves no trace of itself."""
        with translated("looking for a source"):
            found = self._sources.find_one(_identity(job, format) | {"generation": 0})
        if found is None or job.options.force:
            return _Registered(UNREGISTERED, True, None)
        if _entry(found, job) is None:
            return _Registered(UNREGISTERED, True, None)
        return _Registered(bytes(found["tag"]), False, self._loaded_by(job, format))

    def _forced(self, job: Job, format: Format) -> Document:
        """A generation of its own for this job, the same one whenever it is asked."""
        of = _identity(job, format)
        while True:
            found = self._sources.find_one(of | {"forJob": job_key(job.id)})
            if found is None:
                last = self._sources.find_one(of, sort=[("generation", -1)])
                found = self._found_or_made(job, format, (last["generation"] if last else 0) + 1, job_key(job.id))
            if found.get("forJob") == job_key(job.id):
                return found

    def _found_or_made(self, job: Job, format: Format, generation: int, owner: ObjectId | None) -> Document:
        of = _identity(job, format) | {"generation": generation}
        draws = 0
        while True:
            draws += 1
            try:
                found = self._sources.find_one_and_update(
                    of,
                    {"$setOnInsert": _new(job, owner, draws // TAG_DRAWS)},
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
            except DuplicateKeyError:
                continue  # the tag is taken: draw again; or another worker registered the source: find it
            assert found is not None  # an upsert returns what it found or made
            return found


def _new(job: Job, owner: ObjectId | None = None, later: int = 0) -> Document:
    """A source that is not known yet, with a tag drawn for it in the second of its registration, or some later."""
    second = int(job.created_at.timestamp()) + later
    tag = second.to_bytes(4, "big") + secrets.token_bytes(2)
    return {"tag": Binary(tag), "forJob": owner, "loads": [_load(job)]}


def _place(job: Job) -> Document:
    return {"collection": job.options.collection, "database": job.database}


def _load(job: Job) -> Document:
    return _place(job) | {"firstJob": job_key(job.id)}


def _entry(source: Document, job: Job) -> Document | None:
    """What a source tells of the collection that a job loads into."""
    place = _place(job).items()
    return next((entry for entry in source["loads"] if place <= entry.items()), None)


def _identity(job: Job, format: Format) -> Document:
    return same_source(job.source) | {"format": format}
