"""One process against real servers: write, range read, queue operations, upload."""

import io
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.client import Client
from bench.rig import Rig
from engine.batches import Batcher
from engine.decode import decode
from engine.lines import Splitter
from engine.model import ByteRange, Format, JobOptions, Plan, Tally
from engine.sink import Sink

MIB = 1024 * 1024
Files = Callable[[str, int], Path]


@pytest.mark.benchmark(group="write")
@pytest.mark.parametrize("batch", [100, 1000, 10_000])
def test_write(measure: Any, rig: Rig, file: Files, quick: bool, batch: int) -> None:
    """Batches into MongoDB one after the other, unordered, `w: majority`; parsing included."""
    count = 10_000 if quick else 50_000
    data = file("ordinary", count).read_bytes()
    splitter, batcher = Splitter(0, len(data), 1 << 25), Batcher(batch, 4 * MIB)
    batches = [b for block in splitter.feed(data) for b in batcher.add(block)] + list(batcher.flush())

    def write() -> int:
        tag = uuid.uuid4().bytes[:6]
        name = f"w{uuid.uuid4().hex[:8]}"
        sink = Sink(rig.store, name, Plan(Format.NDJSON, tag, len(data), 1, True, 1 << 25), 10)
        inserted = sum(sink.write(decode(b, Format.NDJSON, tag, "key"))[0].inserted for b in batches)
        rig.store.data.drop_collection(name)
        return inserted

    assert measure(write, size=len(data), records=count, batch=batch, rounds=3) == count


@pytest.mark.benchmark(group="range read")
@pytest.mark.parametrize("size", [1 * MIB, 8 * MIB, 64 * MIB])
def test_range_read(measure: Any, rig: Rig, quick: bool, size: int) -> None:
    """One ranged GET read to its end, in pieces of 1 MiB."""
    if quick:
        size = min(size, 16 * MIB)
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
    ledger.open(job.id, [ByteRange(index, index * 10, index * 10 + 10) for index in range(20_000)])
    lease = ledger.lease(job.id, "bench")
    assert lease is not None

    def lease_and_close() -> None:
        taken = ledger.lease(job.id, "bench")
        assert taken is not None
        ledger.close(taken, Tally())

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


@pytest.fixture(scope="module")
def http(rig: Rig) -> Iterator[Client]:
    """The HTTP API, in a process of its own."""
    with rig.api() as client:
        yield client


@pytest.mark.benchmark(group="upload")
@pytest.mark.parametrize("through", ["POST /upload", "boto3 upload_file"])
def test_upload(measure: Any, rig: Rig, http: Client, file: Files, quick: bool, through: str) -> None:
    """A file into S3: through the API, and as boto3 does it by itself."""
    count = 100_000 if quick else 1_000_000
    path = file("ordinary", count)

    def upload() -> str:
        if through == "POST /upload":
            return http.upload(path)
        key = f"{uuid.uuid4().hex}.ndjson"
        rig.s3.upload_file(str(path), rig.bucket, key, ExtraArgs={"ContentType": "application/json"})
        return key

    assert measure(upload, size=path.stat().st_size, records=count, rounds=2, through=through)
