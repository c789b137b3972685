"""GET /metrics for Prometheus: the queue, the sums over all workers there have been, and this process's requests."""

import time
from collections.abc import Iterator
from typing import Final

import falcon
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.operations import Answer, Scope, operation
from engine.history import History
from engine.model import TERMINAL
from engine.stats import STAGES, live, totals
from engine.store import Store

__all__ = ["Durations", "Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
READ_SECONDS: Final = 1.0

_COUNTERS: Final = {
    "lines": ("headrace_lines", "Lines that workers have taken through to their end"),
    "inserted": ("headrace_records", "Records that workers have had acknowledged"),
    "bytes": ("headrace_bytes", "Bytes of these lines"),
    "rejected": ("headrace_rejects", "Lines that were rejected"),
    "retries": ("headrace_retries", "Reads and writes that were tried again"),
    "leases_lost": ("headrace_leases_lost", "Leases that a worker found in other hands"),
    "leases_expired": ("headrace_leases_expired", "Leases that ran out and were freed"),
    "ranges": ("headrace_ranges", "Leases that workers have taken to an end"),
}


class _State(Collector):
    """What the control database knows, read at most once a second."""

    def __init__(self, store: Store, history: History) -> None:
        self._store = store
        self._history = history
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
            "headrace_queue_oldest_seconds", "Age of the oldest open job that is due", value=backlog.oldest_seconds
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
        yield GaugeMetricFamily("headrace_workers", "Workers that are alive", value=len(workers))
        memory = GaugeMetricFamily(
            "headrace_worker_memory_bytes", "Resident memory of a worker", labels=["host", "slot"]
        )
        for worker in workers:
            memory.add_metric([worker["host"], str(worker["slot"])], worker["memory"])
        yield memory


class Durations:
    """Middleware: how long requests take, by method, route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "headrace_http_request_seconds",
            "Seconds from the application's first sight of a request to its answer",
            ["method", "route", "status"],
            registry=registry,
        )

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Note when it began."""
        req.context.began = time.perf_counter()

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Note how long it took; an unknown path is one route, whatever it is."""
        began = getattr(req.context, "began", None)
        if began is not None:
            route = req.uri_template or "unknown"
            method = req.method if req.method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
            self._seconds.labels(method, route, str(resp.status_code)).observe(time.perf_counter() - began)


class Metrics:
    """GET /metrics."""

    def __init__(self, store: Store, history: History, registry: CollectorRegistry) -> None:
        self._registry = registry
        registry.register(_State(store, history))

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
