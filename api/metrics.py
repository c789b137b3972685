"""GET /metrics for Prometheus: the queue, and totals over all workers and API processes, past and present."""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

import falcon
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from pymongo import WriteConcern
from pymongo.errors import PyMongoError

from api.operations import Answer, Scope, operation
from engine.control.history import History
from engine.control.queue import Queue
from engine.control.stats import STAGES, live, place_of, serving, totals
from engine.control.store import Store, translated
from engine.model import TERMINAL

__all__ = ["Durations", "Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
READ_SECONDS: Final = 1.0
"""How long figures from the control database are reused."""

TELL_SECONDS: Final = 3.0
"""How often a process adds its durations to the control database."""

BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of request durations, in seconds."""

_COUNTERS: Final = {
    "lines": ("headrace_lines", "Lines that workers have finished"),
    "inserted": ("headrace_records", "Records that MongoDB has acknowledged"),
    "bytes": ("headrace_bytes", "Bytes of these lines"),
    "rejected": ("headrace_rejects", "Lines that were rejected"),
    "retries": ("headrace_retries", "Reads and writes that were tried again"),
    "leases_lost": ("headrace_leases_lost", "Leases that a worker lost to another"),
    "leases_expired": ("headrace_leases_expired", "Leases that ran out and were freed"),
    "ranges": ("headrace_ranges", "Leases that workers have finished"),
}


class _State(Collector):
    """Metrics from the control database, read at most once a second."""

    def __init__(self, store: Store, history: History, queue: Queue) -> None:
        self._store = store
        self._history = history
        self._queue = queue
        self._at = float("-inf")
        self._found: list[Metric] = []

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        if time.monotonic() - self._at > READ_SECONDS:
            self._found = list(self._read())
            self._at = time.monotonic()
        yield from self._found

    def _read(self) -> Iterator[Metric]:
        backlog = self._history.backlog()
        jobs = GaugeMetricFamily("headrace_jobs", "Jobs by state", labels=["state"])
        for state, count in backlog.states.items():
            jobs.add_metric([state.value], count)
        yield jobs
        depth = sum(count for state, count in backlog.states.items() if state not in TERMINAL)
        yield GaugeMetricFamily("headrace_queue_depth", "Open jobs", value=depth)
        yield GaugeMetricFamily(
            "headrace_queue_oldest_seconds",
            "How long the oldest due job that has not started has waited",
            value=backlog.oldest_seconds,
        )
        yield GaugeMetricFamily(
            "headrace_queue_paused", "Whether the queue is paused, 1 or 0", value=float(self._queue.paused())
        )
        sums = totals(self._store)
        for name, (metric, what) in _COUNTERS.items():
            yield CounterMetricFamily(metric, what, value=sums.get(name, 0))
        stages = CounterMetricFamily(
            "headrace_stage_seconds", "Seconds of the workers' threads by stage", labels=["stage"]
        )
        for stage in STAGES:
            stages.add_metric([stage], sums.get(f"seconds_{stage}", 0))
        yield stages
        workers = live(self._store)
        here = serving(workers, self._store.data.name)
        yield GaugeMetricFamily("headrace_workers", "Workers that are alive and load into this database", value=here)
        memory = GaugeMetricFamily(
            "headrace_worker_memory_bytes", "Resident memory of a worker", labels=["host", "engine", "slot"]
        )
        for worker in workers:
            # Host and slot are not enough: two engines may run on one host.
            engine = place_of(worker).split(":")[-2]
            memory.add_metric([worker["host"], engine, str(worker["slot"])], worker["memory"])
        yield memory


class Durations(Collector):
    """Middleware: the durations of requests by method, route and status, summed over all processes of the API.

    Each process adds its durations to the control database every few seconds, and reports the sums there; a crash loses
    the last few seconds of them.
    """

    def __init__(self, store: Store) -> None:
        self._sums = store.requests.with_options(write_concern=WriteConcern(1))
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str, str], list[float]] = {}
        threading.Thread(target=self._flush_for_ever, name="durations", daemon=True).start()

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Note when the request began."""
        req.context.began = time.perf_counter()

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Count the request, unless it waited for a job. All unknown paths are one route."""
        began = getattr(req.context, "began", None)
        # How long a client chose to wait says nothing about the API.
        if began is None or getattr(req.context, "waited", False):
            return
        self.count(req.method, req.uri_template or "unknown", resp.status_code, time.perf_counter() - began)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        method = method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        with self._lock:
            # For each bound the requests that took no longer, then all requests, then the sum of their seconds.
            row = self._seen.setdefault((method, route, str(status)), [0.0] * (len(BOUNDS) + 2))
            for index in range(bisect_left(BOUNDS, seconds), len(BOUNDS) + 1):
                row[index] += 1
            row[-1] += seconds

    def _flush_for_ever(self) -> None:
        while True:
            time.sleep(TELL_SECONDS)
            self.flush()

    def flush(self) -> None:
        """Add this process's durations to the sums; what cannot be written is kept for the next time.

        The first error ends it: a database that does not answer is waited for once, not once for each row.
        """
        with self._lock:
            seen, self._seen = self._seen, {}
        try:
            while seen:
                labels, row = next(iter(seen.items()))
                key = dict(zip(("method", "route", "status"), labels, strict=True))
                news = {f"row.{index}": value for index, value in enumerate(row) if value}
                self._sums.update_one({"_id": key}, {"$inc": news}, upsert=True)
                del seen[labels]
        except PyMongoError:
            with self._lock:
                for labels, row in seen.items():
                    there = self._seen.setdefault(labels, [0.0] * len(row))
                    self._seen[labels] = [one + other for one, other in zip(there, row, strict=True)]

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        self.flush()
        found = HistogramMetricFamily(
            "headrace_http_request_seconds",
            "Seconds from when the application gets a request to its answer",
            labels=["method", "route", "status"],
        )
        with translated("summing over the processes of the API"):
            for entry in self._sums.find():
                row = [float(entry["row"].get(str(index), 0)) for index in range(len(BOUNDS) + 2)]
                bounds = [*map(str, BOUNDS), "+Inf"]
                labels = [entry["_id"][name] for name in ("method", "route", "status")]
                found.add_metric(labels, list(zip(bounds, row[:-1], strict=True)), row[-1])
        yield found


class Metrics:
    """GET /metrics."""

    def __init__(
        self, store: Store, history: History, queue: Queue, durations: Durations, registry: CollectorRegistry
    ) -> None:
        self._registry = registry
        registry.register(_State(store, history, queue))
        registry.register(durations)

    @operation(
        summary="Figures for Prometheus",
        group="health",
        scope=Scope.READ,
        answers={200: Answer("The figures", str, "text/plain")},
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 in the text format of Prometheus."""
        resp.content_type = CONTENT_TYPE
        resp.data = generate_latest(self._registry)
