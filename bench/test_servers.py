"""One process against real servers: writes, range reads, queue operations, uploads."""

import io
import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bson
import pytest
from bson.raw_bson import RawBSONDocument

from api.client import Client
from bench.measure import plain_s3
from bench.rig import Rig
from engine.control.job_batches import JobBatches
from engine.control.plans import Plans
from engine.load.sink import Sink
from engine.model import ByteRange, Format, Job, JobOptions, Lease, Plan, Tally
from engine.text.batches import Batcher
from engine.text.decode import decode
from engine.text.lines import Splitter

MIB = 1024 * 1024
TOGETHER = 16
Files = Callable[[str, int], Path]

SIZES = {
    "test_write": ("records", [50_000], [10_000]),
    "test_range_read": ("size", [MIB, 8 * MIB, 64 * MIB], [MIB, 8 * MIB, 16 * MIB]),
    "test_upload": ("records", [1_000_000], [100_000]),
}


@pytest.mark.benchmark(group="write")
@pytest.mark.parametrize("batch", [100, 1000, 10_000])
@pytest.mark.parametrize("what", ["from lines", "ready-made BSON"])
def test_write(measure: Any, rig: Rig, file: Files, what: str, records: int, batch: int) -> None:
    """Write batches one after the other, unordered, `w: majority`: as a worker's writer does, and the write alone."""
    data = file("ordinary", records).read_bytes()
    splitter, batcher = Splitter(0, len(data), 1 << 25), Batcher(batch, 4 * MIB)
    batches = [b for block in splitter.feed(data) for b in batcher.add(block)] + list(batcher.flush())
    tag = uuid.uuid4().bytes[:6]
    ready = what == "ready-made BSON"
    decoded = (decode(b, Format.NDJSON, tag, "key") for b in batches if ready)
    made = [[RawBSONDocument(bson.encode(document)) for document in documents] for documents in decoded]
    names: list[str] = []

    def fresh() -> None:
        for name in names:
            rig.store.data.drop_collection(name)
        names[:] = [f"w{uuid.uuid4().hex[:8]}"]
        rig.store.data.create_collection(names[0])  # it exists for all batches of a load but the first

    def all_of_it() -> int:
        sink = Sink(rig.store, names[0], Plan(Format.NDJSON, tag, len(data), 1, True, 1 << 25), 10)
        return sum(sink.write(decode(b, Format.NDJSON, tag, "key"))[0].inserted for b in batches)

    def write() -> int:
        command = {"insert": names[0], "ordered": False, "writeConcern": {"w": "majority"}}
        return sum(rig.store.data.command(command | {"documents": documents})["n"] for documents in made)

    info = {"batch": batch, "shape": "ordinary"}
    assert (
        measure(write if ready else all_of_it, size=len(data), records=records, rounds=3, setup=fresh, **info)
        == records
    )
    rig.store.data.drop_collection(names[0])


@pytest.mark.benchmark(group="range read")
def test_range_read(measure: Any, rig: Rig, size: int) -> None:
    """One ranged GET, read to its end in pieces of 1 MiB."""
    source = rig.objects.upload(io.BytesIO(b'{"n":1}\n' * (size // 8)), f"{uuid.uuid4().hex}.ndjson")

    def read() -> int:
        with rig.objects.open(source, 0, size) as reader:
            return sum(len(piece) for piece in iter(lambda: reader.read(MIB), b""))

    assert measure(read, size=size, records=0, range_bytes=size, rounds=5) == size


@pytest.mark.benchmark(group="queue")
@pytest.mark.parametrize("what", ["submit", "lease and close", "renew", "status"])
def test_queue(measure: Any, rig: Rig, what: str) -> None:
    """Operations on jobs and ranges, `w: majority`."""
    source = rig.objects.upload(io.BytesIO(b"{}\n"), f"{uuid.uuid4().hex}.ndjson")
    job = rig.queue.submit(source, JobOptions(collection="queue"))
    ledger = rig.ledger
    indices = itertools.count()

    def open_more() -> Lease:
        """Open 20,000 more ranges and lease one: only the benchmark knows how many it will close."""
        ledger.open(job.id, [ByteRange(i, i * 10, i * 10 + 10) for i in itertools.islice(indices, 20_000)])
        found = ledger.lease(job.id, "bench")
        assert found is not None
        return found

    lease = open_more()

    def lease_and_close() -> None:
        ledger.close(ledger.lease(job.id, "bench") or open_more(), Tally())

    operations: dict[str, Callable[[], object]] = {
        "submit": lambda: rig.queue.submit(source, JobOptions(collection="queue")),
        "lease and close": lease_and_close,
        "renew": lambda: ledger.renew(lease, lease.range.start, Tally()),
        "status": lambda: rig.queue.get(job.id),
    }
    try:
        measure(operations[what], size=0, records=1)
    finally:
        for name in ("jobs", "ranges"):
            rig.store.control[name].delete_many({})


@pytest.mark.benchmark(group="queue")
@pytest.mark.parametrize("what", ["claim", "plan and lease", "close and finish"])
def test_small_jobs(measure: Any, rig: Rig, quick: bool, what: str) -> None:
    """A worker's commands to the database for 16 small jobs that it takes on together, `w: majority`."""
    size = 27_000
    sources = [rig.objects.upload(io.BytesIO(b"x" * size), f"{uuid.uuid4().hex}.txt") for _ in range(TOGETHER)]
    plan = Plan(Format.TEXT, bytes(6), size, 1, True, 1 << 25)
    plans = Plans(rig.store, rig.queue, rig.ledger)
    jobs: list[Job] = []
    leases: dict[str, Lease] = {}

    def submit() -> None:
        for name in ("jobs", "ranges"):
            rig.store.control[name].delete_many({})
        JobBatches(rig.store).submit(sources, JobOptions(collection="queue"))
        jobs[:] = next(rig.queue.open_jobs.ready())

    def claim() -> int:
        jobs[:] = plans.claim(jobs, "bench")
        return len(jobs)

    def start() -> int:
        jobs[:] = plans.fix([(job, plan, None) for job in jobs])
        leases.update(rig.ledger.open_leased({job.id: ByteRange(0, 0, size) for job in jobs}, "bench"))
        return len(jobs)

    def finish() -> int:
        assert rig.ledger.close_all([(leases[job.id], Tally()) for job in jobs])
        return len(rig.queue.finish_all([(job, Tally()) for job in jobs]))

    steps = {"claim": claim, "plan and lease": start, "close and finish": finish}

    def before() -> None:
        submit()
        for name, step in steps.items():
            if name == what:
                return
            step()

    try:
        assert measure(steps[what], size=0, records=TOGETHER, rounds=5 if quick else 50, setup=before) == TOGETHER
    finally:
        for name in ("jobs", "ranges", "batches"):
            rig.store.control[name].delete_many({})


@pytest.fixture(scope="module")
def http(rig: Rig) -> Iterator[tuple[Client, int]]:
    """The HTTP API, in a process of its own, and its pid."""
    with rig.api() as served:
        yield served


@pytest.mark.benchmark(group="upload")
@pytest.mark.parametrize("through", ["POST /upload", "boto3 upload_file", "boto3 upload_file, Headrace's settings"])
def test_upload(measure: Any, rig: Rig, http: tuple[Client, int], file: Files, through: str, records: int) -> None:
    """Upload a file to S3: through the API, with boto3's defaults, and with the settings that Headrace gives boto3."""
    path = file("ordinary", records)
    client, pid = http
    s3 = rig.s3 if "settings" in through else plain_s3(rig)
    posted = through == "POST /upload"

    def upload() -> str:
        if posted:
            return client.upload(path)
        key = f"{uuid.uuid4().hex}.ndjson"
        s3.upload_file(str(path), rig.bucket, key, ExtraArgs={"ContentType": "application/json"})
        return key

    info = {"shape": "ordinary", "through": through, "pid": pid if posted else os.getpid()}
    measure(upload, size=path.stat().st_size, records=records, rounds=3, **info)
