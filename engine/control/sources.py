"""Which object versions have been loaded, and into which collections; ties each version to the tag in its `_id`s."""

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
"""Random tags tried with one second as their prefix before the next second is used."""


@dataclass(frozen=True, slots=True)
class Registered:
    """What a plan needs to know about its source: its tag (six bytes), whether the job is the `sole` one to have
    written its documents (as in `Plan`), and the id of the latest job that has loaded it, if there is one and it was
    looked up."""

    tag: bytes
    sole: bool
    completed_by: str | None


class Sources:
    """The registered object versions.

    Args:
        store: the databases.
        others: finds other jobs with the same source.
    """

    def __init__(self, store: Store, others: Loads) -> None:
        self._data = store.data
        self._sources = store.sources
        self._others = others

    def register(self, jobs: Sequence[tuple[Job, Format]]) -> list[Registered]:
        """Register each job's source under one permanent tag, and find out who loaded it into this collection before.

        Raises:
            Transient, Permanent: MongoDB failed; some sources may be registered, and repeating the call is safe.
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
            # Only a job with `force` can have loaded it here before: looked up only if it matters.
            before = self._loaded_by(job, format) if job.options.if_loaded == "skip" else None
            return Registered(bytes(new[job.id]["tag"]), True, before)

        return [one(job, format) for job, format in jobs]

    def _registered(self, job: Job, format: Format) -> Registered:
        """Register the source of one job, which may be registered already."""
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
        # If this first job was put off or cancelled before it had a plan, another one may have been quicker.
        first = ours and not self._others.others_loaded(job, format)
        # If what was loaded has been deleted since, there is again nothing that could be duplicated.
        sole = first or (self._is_empty(job) and not self._others.others_may_load(job, format))
        return Registered(bytes(found["tag"]), sole, self._loaded_by(job, format))

    def _is_empty(self, job: Job) -> bool:
        """Whether the collection that a job loads into is empty."""
        with translated("reading the collection"):
            # Counted by the server: the driver may be unable to decode what others have stored.
            return not self._data[job.options.collection].count_documents({}, limit=1)

    def _loaded_by(self, job: Job, format: Format) -> str | None:
        """The id of the latest job, kept or pruned, that loaded this source, of any generation, into the collection."""
        if kept := self._others.loaded_by(job, format):
            return kept
        with translated("looking for earlier loads"):
            found = list(self._sources.find(_identity(job, format), {"loads": True}))
        entries = (_entry(source, job) or {} for source in found)
        pruned = [entry["completedBy"] for entry in entries if entry.get("completedBy")]
        return str(max(pruned)) if pruned else None

    def _known(self, job: Job, format: Format) -> Registered:
        """Look up the source of a dry run without registering it: a dry run leaves no trace."""
        with translated("looking up a source"):
            found = self._sources.find_one(_identity(job, format) | {"generation": 0})
        if job.options.force or found is None or _entry(found, job) is None:
            return Registered(UNREGISTERED, True, None)
        return Registered(bytes(found["tag"]), False, self._loaded_by(job, format))

    def _forced(self, job: Job, format: Format) -> Document:
        """The generation of the source that belongs to this job alone: made by the first call, found by later ones."""
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
    """A source to register. Its tag is the second of the job's submission, plus `later`, and two random bytes."""
    second = int(job.created_at.timestamp()) + later
    tag = second.to_bytes(4, "big") + secrets.token_bytes(2)
    return {"tag": Binary(tag), "forJob": owner, "loads": [_load(job)]}


def _place(job: Job) -> Document:
    return {"collection": job.options.collection, "database": job.database}


def _load(job: Job) -> Document:
    return _place(job) | {"firstJob": job_key(job.id)}


def _entry(source: Document, job: Job) -> Document | None:
    """The entry of a source for the collection that a job loads into; None if there is none."""
    place = _place(job).items()
    return next((entry for entry in source["loads"] if place <= entry.items()), None)


def _identity(job: Job, format: Format) -> Document:
    return same_source(job.source) | {"format": format}
