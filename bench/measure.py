"""What `make bench-report` measures. Each function runs one comparison, side by side, and returns plain figures.

Walls are in seconds, CPU in seconds, memory in MB. A ratio is always of two figures of one and the same round.
"""

import gc
import os
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import bson
import orjson

from bench import ceiling, shapes
from bench.rig import ROOT, Rig, Taken, cpu_of
from engine.job_batches import JobBatches
from engine.model import JobOptions
from engine.stats import STAGES, totals

__all__ = [
    "Spread",
    "base_cpu",
    "idle",
    "ladder",
    "latency",
    "memory",
    "pickup",
    "scale",
    "shape",
    "small_files",
    "upload",
]

CONNECTIONS: Final = (2, 3, 4)
IMPORT_WORKERS: Final = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def told(self, digits: int = 2) -> str:
        """The median, and the least and the most where there was more than one round."""
        if len(self.values) == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({min(self.values):,.{digits}f}–{max(self.values):,.{digits}f})"


def base_cpu(path: Path) -> tuple[float, float]:
    """CPU seconds of parsing and encoding the same lines in batches of 1000, on one core and nothing else.

    Returns it as Python runs it, with its garbage collector, and with the collector off.
    """

    def run() -> float:
        began = time.process_time()
        for at in range(0, len(lines), 1000):
            bson.encode({"documents": [orjson.loads(line) for line in lines[at : at + 1000]]})
        return time.process_time() - began

    with path.open("rb") as file:
        lines = list(file)
    gc.collect()
    collected = run()
    gc.disable()
    try:
        return collected, run()
    finally:
        gc.enable()


class Ceiling:
    """What the database takes of the records of a file, by the best number of connections, which is found once."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self._rig = rig
        self._work = ceiling.batches(_lines(path))
        self.database: list[float] = []
        walls = {connections: self._send(connections) for connections in CONNECTIONS * 2}  # the second pass counts
        self.connections = min(walls, key=lambda connections: walls[connections])
        self.database.clear()

    def seconds(self) -> float:
        """Wall seconds of one pass; the CPU seconds of the database are added to `database`."""
        return self._send(self.connections)

    def _send(self, connections: int) -> float:
        name = f"c{uuid.uuid4().hex[:8]}"
        before = self._rig.servers_cpu()["mongod"]
        seconds = ceiling.send(*self._rig.primary(), self._rig.store.data.name, name, self._work, connections)
        self.database.append(self._rig.servers_cpu()["mongod"] - before)
        self._rig.store.data.drop_collection(name)
        return seconds

    def beside(self, load: Callable[[], Taken]) -> tuple[float, Taken]:
        """The ceiling before and after a load, averaged, since the speed of a machine drifts; and the load."""
        before = self.seconds()
        taken = load()
        return (before + self.seconds()) / 2, taken


def ladder(rig: Rig, path: Path, rounds: int) -> dict[str, Any]:
    """The same file by the ceiling, by Headrace, and by the import tool; and where a worker's time goes."""
    source = rig.upload(path)
    ceilings = Ceiling(rig, path)
    rows: dict[str, list[float]] = {}
    tool = os.environ.get("MONGOIMPORT")
    stages: dict[str, float] = {}
    records = peak = 0

    def load() -> Taken:
        engine = rig.engine()
        taken = rig.load(source, engine)
        engine.stop()  # it tells its last figures on leaving
        return taken

    for _ in range(rounds):
        base, base_off = base_cpu(path)
        before = totals(rig.store)
        top, taken = ceilings.beside(load)
        after = totals(rig.store)
        stages = {s: stages.get(s, 0) + after.get(f"seconds_{s}", 0) - before.get(f"seconds_{s}", 0) for s in STAGES}
        records += taken.lines
        peak = max(peak, taken.peak_mb)
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
        if tool:
            best = min(_import(rig, tool, path, workers) for workers in IMPORT_WORKERS)
            figures |= {"import": best, "import ratio": best / taken.wall}
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
    return {name: Spread(tuple(values)) for name, values in rows.items()} | {
        "stages": {stage: 1e6 * seconds / records for stage, seconds in stages.items()},
        "peak": peak,
        "connections": ceilings.connections,
    }


def _import(rig: Rig, tool: str, path: Path, workers: int) -> float:
    name = f"i{uuid.uuid4().hex[:8]}"
    uri = rig.settings.mongo_uri.get_secret_value() if rig.settings.mongo_uri else ""
    command = [tool, f"--uri={uri}", f"--collection={name}", f"--file={path}", f"-j{workers}", "--quiet"]
    began = time.perf_counter()
    subprocess.run([*command, '--writeConcern={"w":"majority"}'], check=True)
    seconds = time.perf_counter() - began
    rig.store.data.drop_collection(name)
    return seconds


def _lines(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return list(file)


def shape(rig: Rig, path: Path, rounds: int) -> Spread:
    """Headrace's wall over the ceiling's."""
    source = rig.upload(path)
    ceilings = Ceiling(rig, path)
    ratios = []
    engine = rig.engine()
    for _ in range(rounds):
        top, taken = ceilings.beside(lambda: rig.load(source, engine))
        ratios.append(taken.wall / top)
    engine.stop()
    return Spread(tuple(ratios))


def scale(rig: Rig, path: Path, rounds: int) -> dict[str, Spread]:
    """Walls by the number of processes, and of two engines of one process each."""
    source = rig.upload(path)
    walls: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, sizes in {"1": [1], "2": [2], "4": [4], "two engines of 1": [1, 1]}.items():
            engines = [rig.engine(size) for size in sizes]
            walls.setdefault(name, []).append(rig.load(source, *engines).wall)
            for engine in engines:
                engine.stop()
    return {name: Spread(tuple(values)) for name, values in walls.items()}


def small_files(rig: Rig, files: int, records: int, rounds: int) -> dict[str, Spread]:
    """Jobs a second, from the start of the engine to the last COMPLETED; and the share of the queue in the workers' time."""
    folder = rig.folder / "small"
    folder.mkdir(exist_ok=True)
    path = folder / "small.ndjson"
    shapes.write(str(path), "ordinary", records)
    sources = [rig.upload(path) for _ in range(files)]
    rates, shares = [], []
    for _ in range(rounds):
        batch = JobBatches(rig.store).submit(sources, JobOptions(collection=f"s{uuid.uuid4().hex[:8]}"))
        before = totals(rig.store)
        began = time.time()
        engine = rig.engine()
        while rig.store.jobs.count_documents({"open": True}, limit=1):
            time.sleep(0.05)
        [last] = rig.store.jobs.find({"batch": bson.ObjectId(batch.id)}).sort("finishedAt", -1).limit(1)
        engine.stop()
        after = totals(rig.store)
        seconds = last["finishedAt"].replace(tzinfo=UTC).timestamp() - began
        rates.append(files / seconds)
        shares.append(100 * (after.get("seconds_queue", 0) - before.get("seconds_queue", 0)) / (2 * seconds))
        rig.store.data.drop_collection(last["options"]["collection"])
    return {"jobs/s": Spread(tuple(rates)), "queue %": Spread(tuple(shares))}


def pickup(rig: Rig, times: int) -> Spread:
    """Milliseconds from before POST /process until the plan is made, which is after the first read, on an idle fleet."""
    path = rig.folder / "one.ndjson"
    path.write_bytes(b'{"n":1}\n' * 1000)
    source = rig.upload(path)
    found = []
    engine = rig.engine()
    with rig.api() as client:
        for _ in range(times):
            time.sleep(0.4)
            began = time.time()
            job_id = client.process(source.key, {"collection": "pickup", "force": True})
            while (job := rig.queue.get(job_id)).started_at is None:
                time.sleep(0.005)
            found.append(1000 * (job.started_at.timestamp() - began))
    engine.stop()
    rig.store.data.drop_collection("pickup")
    return Spread(tuple(found))


def idle(rig: Rig, seconds: float) -> float:
    """Percent of one core that an idle engine takes, supervisor and workers together."""
    engine = rig.engine()
    time.sleep(3)

    def spent() -> float:
        return engine.cpu() + cpu_of(engine.process.pid)

    before = spent()
    time.sleep(seconds)
    share = 100 * (spent() - before) / seconds
    engine.stop()
    return share


def upload(rig: Rig, size: int, rounds: int) -> dict[str, Spread]:
    """MB a second of POST /upload and of boto3's own upload_file, of one file."""
    path = rig.folder / "upload.ndjson"
    line = b"".join(shapes.SHAPES["ordinary"](4000))
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(line)
    api, bare = [], []
    with rig.api() as client:
        for _ in range(rounds):
            began = time.perf_counter()
            key = client.upload(path)
            api.append(path.stat().st_size / (time.perf_counter() - began) / 1e6)
            rig.objects.delete(key)
            key = f"{uuid.uuid4().hex}.ndjson"
            began = time.perf_counter()
            rig.s3.upload_file(str(path), rig.bucket, key)
            bare.append(path.stat().st_size / (time.perf_counter() - began) / 1e6)
            rig.objects.delete(key)
    path.unlink()
    ratios = [one / other for one, other in zip(api, bare, strict=True)]
    return {"api": Spread(tuple(api)), "boto3": Spread(tuple(bare)), "ratio": Spread(tuple(ratios))}


@contextmanager
def _delayed(port: int, milliseconds: float) -> Iterator[int]:
    command = [sys.executable, "-m", "bench.delay", str(port), str(milliseconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(10)


def latency(rig: Rig, path: Path, rounds: int, milliseconds: float = 20) -> dict[str, Spread]:
    """Lines a second through a proxy on both sides at 0 ms, and with so much round-trip time added."""
    source = rig.upload(path)
    s3_port = urlsplit(rig.settings.aws_endpoint_url or "").port or 0
    rates: dict[str, list[float]] = {"0 ms": [], "added": []}
    for _ in range(rounds):
        for name, delay in (("0 ms", 0.0), ("added", milliseconds)):
            with _delayed(rig.primary()[1], delay) as mongo, _delayed(s3_port, delay) as s3:
                uri = f"mongodb://127.0.0.1:{mongo}/{rig.store.data.name}?directConnection=true"
                engine = rig.engine(mongo_uri=uri, aws_endpoint_url=f"http://127.0.0.1:{s3}")
                taken: Taken = rig.load(source, engine)
                rates[name].append(taken.lines / taken.wall)
                engine.stop()
    shares = [one / other for one, other in zip(rates["added"], rates["0 ms"], strict=True)]
    return {name: Spread(tuple(values)) for name, values in rates.items()} | {"share": Spread(tuple(shares))}


def memory(rig: Rig, sizes: list[int]) -> dict[int, int]:
    """Peak MB of a worker by the size of the file in bytes; one line in a thousand has 1 MiB."""
    found: dict[int, int] = {}
    plain = b"".join(shapes.SHAPES["ordinary"](1000))
    long = b'{"long":"' + b"x" * (1024 * 1024 - 20) + b'"}\n'
    for size in sizes:
        if shutil.disk_usage(rig.folder).free < 4 * size + 2 * 10**9:
            continue
        path = rig.folder / "memory.ndjson"
        with path.open("wb") as file:
            while file.tell() < size:
                file.write(plain)
                file.write(long)
        source = rig.upload(path)
        path.unlink()
        engine = rig.engine()
        found[size] = rig.load(source, engine).peak_mb
        engine.stop()
        rig.objects.delete(source.key)
    return found
