"""Decide, once, how a job is loaded: its format, the tag of its `_id`s, its ranges.

Any worker may plan a job at any time, and repeatedly: the first compare-and-set wins, and the others follow it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

from engine.control.admission import check_collection
from engine.control.ledger import Ledger
from engine.control.loads import Loads
from engine.control.plans import Plans
from engine.control.queue import Queue
from engine.control.sources import Registered, Sources
from engine.control.store import Store
from engine.errors import HeadraceError, Refused, Transient
from engine.logs import unexpected_translated
from engine.model import ByteRange, Format, Job, JobState, Lease, Plan, Source
from engine.s3.objects import Objects
from engine.settings import Settings
from engine.steps import Step, reach
from engine.text.formats import begins, decide
from engine.text.ranges import count, cut

__all__ = ["SMALL_BYTES", "Planner", "Prepared"]

SNIFF_BYTES: Final = 64 * 1024
"""Bytes of an object that are read to decide its format."""

BLANK_BYTES: Final = 4 * 1024 * 1024
"""Bytes that are read to decide the format if the first `SNIFF_BYTES` are all blank."""

SMALL_BYTES: Final = 256 * 1024
"""An object up to this size is read whole when it is planned."""

READERS: Final = 16
"""Objects that are read side by side: as many as are planned together, so that none waits for one that hangs."""

LOOK_SHARE: Final = 0.5
"""Share of a lease in which S3 must return the first bytes of an object; jobs whose objects take longer are put off."""

RANGES_PER_WORKER: Final = 4
"""More than one, so that at the end of a file the other workers are idle for only a fraction of one worker's share."""

SMALL_RANGE_BYTES: Final = 8 * 1024 * 1024
"""No object is cut into smaller ranges than this only to have more of them: each costs a request and a few writes."""

MAX_RANGES: Final = 100_000
"""The most ranges of one object, whatever the settings: each is a document, and they are summed about once a second."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A planned job, perhaps with a lease on its only range, and the first bytes of its object; or the error that kept
    it from being planned."""

    job: Job
    lease: Lease | None = None
    head: bytes = b""
    error: HeadraceError | None = None


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job, with the first bytes of its object and the format decided on."""

    job: Job
    head: bytes
    format: Format


class Planner:
    """Plans jobs.

    Args:
        store, queue, plans, ledger, objects: the databases, the jobs, their plans and ranges, and S3.
        settings: `engine_range_bytes` is the largest range of a new plan, unless there would be over `MAX_RANGES`; an
            object is cut so that each of `engine_workers` gets several ranges, unless these would be tiny.
        moved: called about every second while S3 is waited for, for no longer than `LOOK_SHARE` of a lease.
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
        self._sources = Sources(store, Loads(store, ledger))
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
        """Let the threads end, without waiting for them."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def prepare(self, jobs: Sequence[Job], holder: str) -> list[Prepared]:
        """Plan PENDING jobs, unless others have by now, and lease the ranges of those that have only one.

        Each step is one command for all jobs, and their objects are read side by side, since a small job mostly waits
        for the database's journal and S3's first byte. A job whose object could not be requested is released for anyone
        to plan, and is not in the result.

        Raises:
            Transient, Permanent: MongoDB failed; some of the jobs may be planned. An error of a single job or its
                object is not raised but returned with that job.
        """
        drafts, failed = self._drafts(jobs, holder)
        plans, unread = self._decide(drafts)
        reach(Step.PLAN)
        heads = {draft.job.id: draft.head for draft in drafts}
        return failed + unread + self._fix(plans, heads, holder)

    def _drafts(self, jobs: Sequence[Job], holder: str) -> tuple[list[_Draft], list[Prepared]]:
        """The jobs whose object could be read, and those that cannot be planned; the others are released."""
        drafts: list[_Draft] = []
        failed: list[Prepared] = []
        unseen: list[Job] = []
        unfit = self._unfit(jobs)
        for job, looked in zip(jobs, self._looks(jobs), strict=True):
            if refusal := unfit.get(job.options.collection):
                failed.append(Prepared(job, error=refusal))
            elif isinstance(looked, _Draft):
                drafts.append(looked)
            elif looked is None:
                unseen.append(job)
            else:
                failed.append(Prepared(job, error=looked))
        if unseen:
            self._plans.release_claims(unseen, holder)
        return drafts, failed

    def _decide(self, drafts: Sequence[_Draft]) -> tuple[list[tuple[Job, Plan, str | None]], list[Prepared]]:
        """Plans, as `Plans.fix` takes them, and the jobs that are COMPLETED without being read."""
        plans: list[tuple[Job, Plan, str | None]] = []
        unread: list[Prepared] = []
        sources = self._sources.register([(draft.job, draft.format) for draft in drafts])
        for draft, source in zip(drafts, sources, strict=True):
            job, plan = draft.job, self._plan(draft, source)
            skip = job.options.if_loaded == "skip" and not job.options.validate
            if plan.range_count == 0 or (source.completed_by and skip):
                self._plans.complete_unread(job, plan, source.completed_by)
                unread.append(Prepared(self._queue.get(job.id)))
            else:
                plans.append((job, plan, source.completed_by))
        return plans, unread

    def _fix(
        self, plans: Sequence[tuple[Job, Plan, str | None]], heads: Mapping[str, bytes], holder: str
    ) -> list[Prepared]:
        """Fix plans, and open the ranges of those that hold; a job's only range is leased at once."""
        done: list[Prepared] = []
        planned = {job.id: job for job in self._plans.fix(plans)}
        single: dict[str, ByteRange] = {}
        for before, plan, _ in plans:
            job = planned.get(before.id, before)
            holds = job.plan if job.state is JobState.PROCESSING and job.stopping is None else None
            if holds is not None and holds.range_count == 1:
                single[job.id] = cut(job.source.size, 1, 0)
                continue
            if holds == plan:
                self._queue.open_ranges(job)
                self._wake()  # other workers have already looked, and found nothing to lease
            done.append(Prepared(job, None, heads[job.id]))
        if single:
            reach(Step.PLANNED)
            leases = self._ledger.open_leased(single, holder)
            done += [Prepared(planned[id], leases.get(id), heads[id]) for id in single]
        return done

    def _unfit(self, jobs: Sequence[Job]) -> dict[str, Refused]:
        """Why collections of these jobs cannot take documents, by name. They are checked again here: they may have been
        created since a job was submitted, and a capped one would accept every document but keep only the last."""
        refusals: dict[str, Refused] = {}
        for name in {job.options.collection for job in jobs}:
            try:
                check_collection(self._data, name)
            except Refused as error:
                refusals[name] = error
        return refusals

    def _looks(self, jobs: Sequence[Job]) -> "list[_Draft | HeadraceError | None]":
        """Look at the objects of all jobs. One that S3 does not return in time must not hold up the others, nor this
        worker. None for those that were never requested because earlier requests that hang occupy all the threads."""
        looks = [self._readers.submit(self._look, job) for job in jobs]
        end = time.monotonic() + self._look_seconds
        waiting = set(looks)
        while waiting and (left := end - time.monotonic()) > 0:
            _, waiting = wait(waiting, min(left, 1))
            self._moved()
        late = Transient(
            f"S3 did not show the beginning of the object within {self._look_seconds:g} seconds: it is busy or hanging"
        )
        never = {look for look in waiting if look.cancel()}
        return [None if look in never else late if look in waiting else look.result() for look in looks]

    def _look(self, job: Job) -> "_Draft | HeadraceError":
        """Read the beginning of a job's object, or all of it if small, and decide its format; returns any error."""
        try:
            with unexpected_translated(f"inspecting {job.source.key}"):
                head = b""
                if size := job.source.size:
                    size = min(size, SMALL_BYTES if size <= SMALL_BYTES else SNIFF_BYTES)
                    head = self._head(job.source, size)
                    if job.options.format is Format.AUTO and size < job.source.size and not begins(head):
                        # The first byte that is not blank decides the format: look further for it.
                        head = self._head(job.source, min(job.source.size, BLANK_BYTES))
                return _Draft(job, head, decide(job.options.format, job.source.key, head))
        except HeadraceError as error:
            return error

    def _head(self, source: Source, size: int) -> bytes:
        """The first bytes of an object; tried twice, since a connection closed by S3 is no reason to put a job off."""
        for last in (False, True):
            try:
                with self._objects.open(source, 0, size) as reader:
                    return reader.read(size)
            except Transient:
                if last:
                    raise
        raise AssertionError  # the last try returns or raises

    def _plan(self, draft: _Draft, source: Registered) -> Plan:
        size = draft.job.source.size
        share = max(-(-size // self._shares), SMALL_RANGE_BYTES)
        range_bytes = max(min(self._range_bytes, share), -(-size // MAX_RANGES))
        return Plan(draft.format, source.tag, range_bytes, count(size, range_bytes), source.sole, self._max_line_bytes)
