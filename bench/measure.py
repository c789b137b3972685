"""What `make bench-report` measures. Each function runs one comparison side by side and returns its figures.

Wall times are in seconds, CPU in seconds, memory in MB. A ratio has both figures from the same round, except where `scale`
compares numbers of processes.
"""

import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import boto3
import bson

from bench import importer, shapes
from bench.baselines import Ceiling, base_cpu
from bench.figures import Load, Spent, Spread, load
from bench.rig import ROOT, Rig, cpu_of
from engine.children import before_exec
from engine.control.job_batches import JobBatches
from engine.control.stats import totals
from engine.machine import cores
from engine.model import JobOptions, JobState

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = [
    "ADDED_MILLISECONDS",
    "DENSE",
    "SIZES",
    "VARIED",
    "defaults",
    "dense_memory",
    "idle",
    "ladder",
    "latency",
    "memory",
    "pickup",
    "plain_s3",
    "room_for",
    "scale",
    "shape",
    "small_files",
    "upload",
]

Way = TypeVar("Way")

SIZES: Final = {"1": (1,), "2": (2,), "4": (4,), "two engines of 1": (1, 1)}
"""What `scale` compares: the number of workers of each engine."""

ADDED_MILLISECONDS: Final = 20
"""Round-trip time that `latency` adds to MongoDB and to S3."""

MIB: Final = 1024 * 1024

VARIED: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "ordinary": {
        "engine_writers": (1, 2, 8, 16),
        "engine_read_bytes": (MIB // 4, 4 * MIB),
        "engine_range_bytes": (8 * MIB, 16 * MIB),  # a larger one would not cut this file
        "engine_batch_records": (500, 2000),
    },
    "wide": {"engine_batch_bytes": (MIB, 4 * MIB)},
}
"""By shape of the records: the values of settings that `defaults` compares with their defaults."""


def ladder(rig: Rig, path: Path, rounds: int, tool: str | None) -> dict[str, Any]:
    """The same file loaded by the ceiling, Headrace through its HTTP API, and the import tool; and what Headrace spent.

    The import tool's best number of workers is determined after the first load; if the tool fails, `import note` says
    why and its figures are left out.
    """
    source = rig.upload(path)
    ceilings = Ceiling(rig, path)
    rows: dict[str, list[float]] = {}
    loads: list[Load] = []
    candidates, note = importer.look(tool)
    with rig.api() as (client, _):
        for _ in range(rounds):
            base, base_off = base_cpu(path)
            top, one = ceilings.beside(lambda: load(rig, source, 2, through=client))
            loads.append(one)
            taken = one.taken
            figures = {
                "ceiling": top,
                "headrace": taken.wall,
                "wall ratio": taken.wall / top,
                "base cpu": base,
                "base cpu, collector off": base_off,
                "worker cpu": taken.cpu,
                "database cpu": taken.servers["mongod"],
                "database cpu, ceiling": statistics.mean(ceilings.database[-2:]),
                "s3 cpu": taken.servers["weed"],
                "cpu ratio": taken.cpu / base,
                "cpu ratio, collector off": taken.cpu / base_off,
            }
            if tool and candidates:
                try:
                    if len(candidates) > 1:
                        candidates = (importer.best(rig, tool, path, candidates, taken.lines),)
                    wall = importer.run(rig, tool, path, candidates[0], taken.lines)
                except (OSError, RuntimeError) as error:
                    candidates, note = (), str(error)
                else:
                    figures |= {"import": wall, "import ratio": wall / taken.wall}
            for name, value in figures.items():
                rows.setdefault(name, []).append(value)
    if candidates:
        note = f"{note}, -j{candidates[0]}"
    else:
        rows = {name: values for name, values in rows.items() if not name.startswith("import")}
    return {name: Spread(tuple(values)) for name, values in rows.items()} | {
        "spent": Spent.of(loads, rig.settings.engine_writers),
        "connections": ceilings.connections,
        "import note": note,
    }


def shape(rig: Rig, path: Path, rounds: int) -> dict[str, Spread]:
    """Headrace's wall time over the ceiling's, and that of the ceiling with parsing beside it, over the ceiling's."""
    source = rig.upload(path)
    ceilings = Ceiling(rig, path)
    ratios, floors = [], []
    for _ in range(rounds):
        top, one = ceilings.beside(lambda: load(rig, source, 2))
        ratios.append(one.taken.wall / top)
        floors.append(ceilings.with_parsing(2) / top)
    return {"ratio": Spread(tuple(ratios)), "floor": Spread(tuple(floors))}


def _turned(ways: list[Way], turn: int) -> list[Way]:
    """The ways, starting with another one in each turn, since the speed of a machine drifts."""
    first = turn % len(ways)
    return ways[first:] + ways[:first]


def scale(rig: Rig, path: Path, rounds: int) -> dict[str, tuple[Spread, Spent]]:
    """The wall times and what was spent for each of `SIZES`."""
    source = rig.upload(path)
    loads: dict[str, list[Load]] = {}
    ways = list(SIZES.items())
    for turn in range(rounds):
        for name, sizes in _turned(ways, turn):
            loads.setdefault(name, []).append(load(rig, source, *sizes))
    return {
        name: (
            Spread(tuple(one.taken.wall for one in loads[name])),
            Spent.of(loads[name], rig.settings.engine_writers),
        )
        for name in SIZES
    }


def defaults(rig: Rig, path: Path, rounds: int, varied: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Wall times with one setting changed, over those with the defaults, which run first and last in each round.

    `peaks` has the highest MB of a worker by setting, over all rounds; the key None stands for the defaults.

    Another setting comes first in each round. `noise` is the largest difference between the two default runs of a
    round, as a share; `others` is the largest share of the cores that anything else on this machine took in a round,
    None if that is not known.
    """
    source = rig.upload(path)
    settings = [(name, value) for name, values in varied.items() for value in values]
    ratios: dict[tuple[str, int], list[float]] = {which: [] for which in settings}
    peaks: dict[tuple[str, int] | None, int] = dict.fromkeys([None, *settings], 0)
    differences: list[float] = []
    others: list[float | None] = []
    for turn in range(rounds):
        start = turn * len(settings) // rounds
        order = settings[start:] + settings[:start]
        changes: list[dict[str, Any]] = [{}, *({name: value} for name, value in order), {}]
        loads = [load(rig, source, 2, **changed).taken for changed in changes]
        first, *walls, last = (taken.wall for taken in loads)
        differences.append(abs(last - first) / min(first, last))
        taken_by_others = [taken.others for taken in loads if taken.others is not None]
        known = len(taken_by_others) == len(loads)
        others.append(sum(taken_by_others) / (cores() * sum(taken.seconds for taken in loads)) if known else None)
        for which, seconds in zip(order, walls, strict=True):
            ratios[which].append(2 * seconds / (first + last))
        for changed, taken in zip([None, *order, None], loads, strict=True):
            peaks[changed] = max(peaks[changed], taken.peak_mb)
    return {
        "ratios": {which: Spread(tuple(some)) for which, some in ratios.items()},
        "peaks": peaks,
        "noise": max(differences),
        "others": None if None in others else max(share for share in others if share is not None),
    }


def small_files(rig: Rig, files: int, records: int, rounds: int) -> dict[str, Spread]:
    """Jobs per second, from the engine's start to the last COMPLETED; and the percentage of that time in which a worker waits
    for the queue.

    Every round uploads new objects: objects that were loaded before are planned one at a time.
    """
    path = rig.folder / "small.ndjson"
    shapes.write(path, "ordinary", records)
    batches = JobBatches(rig.store)
    rates, shares = [], []
    for _ in range(rounds):
        name = f"s{uuid.uuid4().hex[:8]}"
        batch = batches.submit([rig.upload(path) for _ in range(files)], JobOptions(collection=name))
        before = totals(rig.store)
        began = time.time()
        with rig.engine() as engine:
            workers = len(engine.workers())
            while rig.store.jobs.count_documents({"open": True}, limit=1):
                engine.alive()
                time.sleep(0.05)
        after = totals(rig.store)
        states, documents = batches.get(batch.id).states, rig.store.data[name].count_documents({})
        if states != {JobState.COMPLETED: files} or documents != files * records:
            raise RuntimeError(f"{files} jobs of {records} lines ended as {states} with {documents} documents")
        [last] = rig.store.jobs.find({"batch": bson.ObjectId(batch.id)}).sort("finishedAt", -1).limit(1)
        finished = last["finishedAt"].timestamp()
        rates.append(files / (finished - began))
        queue = after.get("seconds_queue", 0) - before.get("seconds_queue", 0)
        shares.append(100 * queue / (workers * (finished - began)))
        rig.store.data.drop_collection(name)
    return {"jobs/s": Spread(tuple(rates)), "queue %": Spread(tuple(shares))}


def pickup(rig: Rig, times: int) -> Spread:
    """Milliseconds from just before POST /process until the job is planned, after its first read, on an idle fleet."""
    path = rig.folder / "one.ndjson"
    path.write_bytes(b'{"n":1}\n' * 1000)
    source = rig.upload(path)
    found = []
    with rig.engine() as engine, rig.api() as (client, _):
        for _ in range(times):
            time.sleep(0.4)
            began = time.time()
            job_id, _ = client.process(source.key, {"collection": "pickup", "force": True})
            while (job := rig.queue.get(job_id)).started_at is None:
                engine.alive()
                time.sleep(0.005)
            found.append(1000 * (job.started_at.timestamp() - began))
    rig.store.data.drop_collection("pickup")
    return Spread(tuple(found))


def idle(rig: Rig, seconds: float, times: int) -> Spread:
    """Percent of one core that an idle engine takes, supervisor and workers: `times` samples of `seconds` each."""
    with rig.engine() as engine:
        time.sleep(3)

        def spent() -> float:
            return engine.cpu() + cpu_of(engine.process.pid)

        def once() -> float:
            before = spent()
            time.sleep(seconds)
            return 100 * (spent() - before) / seconds

        return Spread(tuple(once() for _ in range(times)))


def plain_s3(rig: Rig) -> "S3Client":
    """A boto3 client with boto3's default configuration."""
    found = rig.settings
    return boto3.client(
        "s3",
        endpoint_url=found.aws_endpoint_url,
        region_name=found.aws_region,
        aws_access_key_id=found.aws_access_key_id,
        aws_secret_access_key=found.aws_secret_access_key.get_secret_value() if found.aws_secret_access_key else None,
    )


def upload(rig: Rig, size: int, rounds: int) -> dict[str, Spread]:
    """MB per second of a file through POST /upload, boto3's upload_file, and upload_file with Headrace's settings.

    Another one comes first in each round.
    """
    path = rig.folder / "upload.ndjson"
    line = b"".join(shapes.SHAPES["ordinary"](4000))
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(line)

    def bare(s3: "S3Client") -> str:
        key = f"{uuid.uuid4().hex}.ndjson"
        s3.upload_file(str(path), rig.bucket, key)
        return key

    rates: dict[str, list[float]] = {}
    with rig.api() as (client, _):
        ways: list[tuple[str, Callable[[], str]]] = [
            ("api", lambda: client.upload(path)),
            ("boto3", partial(bare, plain_s3(rig))),
            ("boto3, tuned", partial(bare, rig.s3)),
        ]
        for turn in range(rounds):
            for name, way in _turned(ways, turn):
                began = time.perf_counter()
                key = way()
                rates.setdefault(name, []).append(path.stat().st_size / (time.perf_counter() - began) / 1e6)
                rig.objects.delete(key)
    path.unlink()
    ratios = {
        f"over {name}": [one / other for one, other in zip(rates["api"], rates[name], strict=True)]
        for name in ("boto3", "boto3, tuned")
    }
    return {name: Spread(tuple(values)) for name, values in (rates | ratios).items()}


@contextmanager
def _delayed(port: int, milliseconds: float) -> Iterator[int]:
    command = [sys.executable, "-m", "bench.delay", str(port), str(milliseconds)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=before_exec,  # noqa: PLW1509 (other threads hold no lock at this point)
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(10)


def latency(rig: Rig, path: Path, rounds: int) -> dict[str, Spread]:
    """Lines per second through proxies to MongoDB and S3, at 0 ms and with `ADDED_MILLISECONDS` of round-trip time."""
    source = rig.upload(path)
    s3_port = urlsplit(rig.settings.aws_endpoint_url or "").port or 0
    rates: dict[str, list[float]] = {"0 ms": [], "added": []}
    ways = [("0 ms", 0), ("added", ADDED_MILLISECONDS)]
    for turn in range(rounds):
        for name, delay in ways[:: -1 if turn % 2 else 1]:
            with _delayed(rig.primary()[1], delay) as mongo, _delayed(s3_port, delay) as s3:
                uri = f"mongodb://127.0.0.1:{mongo}/{rig.store.data.name}?directConnection=true"
                taken = load(rig, source, 2, mongo_uri=uri, aws_endpoint_url=f"http://127.0.0.1:{s3}").taken
                rates[name].append(taken.lines / taken.wall)
    shares = [one / other for one, other in zip(rates["added"], rates["0 ms"], strict=True)]
    return {name: Spread(tuple(values)) for name, values in rates.items()} | {"share": Spread(tuple(shares))}


def room_for(size: int) -> int:
    """Bytes of disk that the memory test needs for a file of this size: file, object, documents, journals."""
    return 4 * size + 2 * 10**9


def memory(rig: Rig, sizes: list[int]) -> dict[int, int | None]:
    """Peak MB of a worker by file size in bytes; one line in a thousand has 1 MiB. None: no room on the disk."""
    lines = b"".join(shapes.SHAPES["ordinary"](1000)) + b'{"long":"' + b"x" * (MIB - 20) + b'"}\n'
    return {size: _peak(rig, size, lines) for size in sizes}


DENSE: Final = {"digits": b"1", "empty objects": b"{}", "nested arrays": b"[" * 90 + b"]" * 90}
"""Values that take most memory for their length, as objects of Python or as BSON; `dense_memory` fills lines with them."""


def dense_memory(rig: Rig, size: int) -> dict[int, int | None]:
    """As `memory`, with files whose lines each have 1 MiB of a kind of small values: the highest peak of all kinds."""
    peaks = [
        _peak(rig, size, b'{"a":[' + b",".join([value] * ((MIB - 20) // (len(value) + 1))) + b"]}\n")
        for value in DENSE.values()
    ]
    known = [peak for peak in peaks if peak is not None]
    return {size: max(known) if len(known) == len(peaks) else None}


def _peak(rig: Rig, size: int, lines: bytes) -> int | None:
    """Peak MB of a worker with a file of these lines over and over, of at least so many bytes."""
    if shutil.disk_usage(rig.folder).free < room_for(size):
        return None
    path = rig.folder / "memory.ndjson"
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(lines)
    source = rig.upload(path)
    path.unlink()
    peak = load(rig, source, 2).taken.peak_mb
    rig.objects.delete(source.key)
    return peak
