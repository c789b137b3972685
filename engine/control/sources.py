"""Which versions of objects have been loaded, and where to: the record that ties each of them to the tag of its `_id`s."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bson import Binary, ObjectId
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import DuplicateKeyError

from engine.control.jobs import same_source
from engine.control.loads import Loads
from engine.control.store import Document, Store, job_key, translated, write_all
from engine.model import Format, Job

__all__ = ["Registered", "Sources"]

UNREGISTERED: Final = bytes(6)
"""The tag of a source that nobody has loaded; no document carries it."""

TAG_DRAWS: Final = 64
"""Random tags tried for one second before the next second is taken."""


@dataclass(frozen=True, slots=True)
class Registered:
    """What a plan needs of its source: the six bytes of its tag, whether the job is the `sole` one to have written its
    documents (as in `Plan`), and the latest job that has loaded it, where that was asked or is known."""

    tag: bytes
    sole: bool
    completed_by: str | None


class Sources:
    """The versions of objects that are known.

    Args:
        store: the databases.
        others: tells of other jobs with the same source.
    """

    def __init__(self, store: Store, others: Loads) -> None:
        self._data = store.data
        self._sources = store.sources
        self._others = others

    def register(self, jobs: Sequence[tuple[Job, Format]]) -> list[Registered]:
        """Hold the source of each job to one tag, and learn who has loaded it into this collection before.

        Raises:
            Transient, Permanent: of MongoDB; some of the sources may be registered, which is safe to repeat.
        """
        new = {job.id: _new(job) for job, _ in jobs if not (job.options.force or job.options.validate)}
        ours: set[str] = set()
        if new:
            writes = [
                UpdateOne(_identity(job, format) | {"generation": 0}, {"$setOnInsert": new[job.id]}, upsert=True)
                for job, format in jobs
                if job.id in new
            ]
            with translated("registering sources"):
                made = {entry["index"] for entry in write_all(self._sources, writes)["upserted"]}
            ours = {id for index, id in enumerate(new) if index in made}

        def one(job: Job, format: Format) -> Registered:
            if job.options.validate:
                return self._known(job, format)
            if job.id not in ours:
                return self._registered(job, format)
            # Only `force` can have loaded it here before: asked where it matters.
            before = self._loaded_by(job, format) if job.options.if_loaded == "skip" else None
            return Registered(bytes(new[job.id]["tag"]), True, before)

        return [one(job, format) for job, format in jobs]

    def _registered(self, job: Job, format: Format) -> Registered:
        """As `register`, for one job whose source may be there already."""
        with translated("registering a source"):
            found = self._forced(job, format) if job.options.force else self._found_or_made(job, format, 0, None)
            if _entry(found, job) is None:
                unknown = {"_id": found["_id"], "loads": {"$not": {"$elemMatch": _place(job)}}}
                self._sources.update_one(unknown, {"$push": {"loads": _load(job)}})
                found = self._sources.find_one({"_id": found["_id"]}) or found
        entry = _entry(found, job)
        assert entry is not None  # it was there, or has just been pushed
        if job.options.force:
            return Registered(bytes(found["tag"]), True, None)
        ours = entry["firstJob"] == job_key(job.id) and entry.get("completedBy") is None
        # Its first job may have been put off, or cancelled, before it had a plan, and another one been quicker.
        first = ours and not self._others.others_loaded(job, format)
        # What was loaded may have been deleted since: then again there is nothing that a duplicate could be of.
        sole = first or (self._is_empty(job) and not self._others.others_may_load(job, format))
        return Registered(bytes(found["tag"]), sole, self._loaded_by(job, format))

    def _is_empty(self, job: Job) -> bool:
        """Whether the collection that a job loads into holds no document."""
        with translated("looking into the collection"):
            # Counted by the server: what others have stored, the driver may not be able to read.
            return not self._data[job.options.collection].count_documents({}, limit=1)

    def _loaded_by(self, job: Job, format: Format) -> str | None:
        """The latest job that has loaded this source, of any generation, into the same collection, its history kept or not."""
        if kept := self._others.loaded_by(job, format):
            return kept
        with translated("looking for earlier loads"):
            found = list(self._sources.find(_identity(job, format), {"loads": True}))
        entries = (_entry(source, job) or {} for source in found)
        pruned = [entry["completedBy"] for entry in entries if entry.get("completedBy")]
        return str(max(pruned)) if pruned else None

    def _known(self, job: Job, format: Format) -> Registered:
        """What is known of the source of a job that writes nothing, which leaves no trace of itself."""
        with translated("looking for a source"):
            found = self._sources.find_one(_identity(job, format) | {"generation": 0})
        if job.options.force or found is None or _entry(found, job) is None:
            return Registered(UNREGISTERED, True, None)
        return Registered(bytes(found["tag"]), False, self._loaded_by(job, format))

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
