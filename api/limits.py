"""Bounds on what goes on at a time: beyond them a client is told when to come again, and costs nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import falcon

from api.operations import Wait, operation_of
from api.problems import Problem
from engine.control.queue import Queue
from engine.errors import KeyReused, Refused

__all__ = ["LEAVE", "OpenJobsLimit", "S3Calls", "Slots", "gone_of"]

COUNT_SECONDS: Final = 1.0

SLOW_SECONDS: Final = 5.0
"""A call that has waited for S3 for so long tells that it is in trouble."""

TURN_SECONDS: Final = 2.0
"""How long a call waits until it may ask S3: many come at once, and take milliseconds."""

LEAVE: Final = "headrace.leave"
"""Where a request's environment holds what to call when an upload is done with, so that the next may be sent from then on."""


def gone_of(req: falcon.Request) -> Callable[[], bool]:
    """What tells whether the client of a request has left: nothing is to be held for it from then on."""
    return cast("Callable[[], bool]", req.env.get("waitress.client_disconnected", lambda: False))


class Slots:
    """So many at a time; `take` one and `give` it back.

    Args:
        most: how many there are.
        status: of the problem where none is left, 429 or 503.
        what: a plural noun for the detail of that problem, such as "downloads".
    """

    def __init__(self, most: int, status: int, what: str) -> None:
        self._free = threading.Semaphore(most)
        self._status = status
        self._what = (
            f"{most} {what} are under way already, the most at a time: try again in a little while"
            if most
            else f"this server takes no {what}: ask without waiting"
        )

    def take(self) -> None:
        """Raises Problem where none is left."""
        if not self._free.acquire(blocking=False):
            raise Problem(self._status, "busy", self._what)

    def give(self) -> None:
        """Give one back."""
        self._free.release()


class S3Calls:
    """Middleware: an S3 that does not answer does not take the threads from calls that do without it, `/healthz` among them.

    Args:
        most: how many calls may be at S3 at a time; others wait a moment for their turn.
        clock: tells seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._free = threading.Semaphore(most)
        self._clock = clock
        self._began: dict[int, float] = {}  # by request; of those that are quick where S3 is well
        self._held: set[int] = set()
        self._lock = threading.Lock()

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raises Problem where S3 does not answer those that have asked it, or where too many do."""
        operation = operation_of(resource, req.method)
        if operation is None or operation.waits_for_s3 is None:
            return
        with self._lock:
            now = self._clock()
            slow = sum(now - began > SLOW_SECONDS for began in self._began.values())
        if 2 * slow >= self._most:
            raise Problem(503, "unavailable", "S3 does not answer the calls before this: send it again later")
        if not self._free.acquire(timeout=TURN_SECONDS):
            what = f"{self._most} calls are at S3 already, the most at a time"
            raise Problem(503, "busy", f"{what}: try again in a little while, or raise API_THREADS")
        with self._lock:
            self._held.add(id(req))
            if operation.waits_for_s3 is Wait.BRIEF:
                self._began[id(req)] = self._clock()

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """It waits no longer."""
        with self._lock:
            held = id(req) in self._held
            self._held.discard(id(req))
            self._began.pop(id(req), None)
        if held:
            self._free.release()


class OpenJobsLimit:
    """Keeps the queue from growing without bound; it is counted once a second at most, and what is let in between is added."""

    def __init__(self, queue: Queue, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._most = most
        self._clock = clock
        self._at = float("-inf")
        self._open = 0
        self._counting = False
        self._since = 0  # let in since the last count began
        self._lock = threading.Lock()

    @contextmanager
    def let_in(self, jobs: int) -> Iterator[None]:
        """Within it, so many jobs are made. Raises Problem where they would be too many together with those that are open."""
        if jobs > self._most:
            raise Problem(
                422,
                "too_many_jobs",
                f"{jobs} jobs are more than may be open at all (API_MAX_OPEN_JOBS={self._most}): submit fewer at a time",
            )
        self._count()
        with self._lock:
            if self._open + jobs > self._most:
                raise Problem(
                    503,
                    "queue_full",
                    f"{jobs} more would exceed {self._most} open jobs (API_MAX_OPEN_JOBS): submit again when some have "
                    "ended",
                )
            self._open += jobs
            self._since += jobs
        try:
            yield
        except (Refused, KeyReused):  # of others, some may have been made
            with self._lock:
                self._open, self._since = max(self._open - jobs, 0), max(self._since - jobs, 0)
            raise

    def _count(self) -> None:
        """Count anew where that is due. One request does, and the others go by the count before: a database that does not answer
        must not make them queue up behind each other."""
        with self._lock:
            if self._counting or self._clock() - self._at <= COUNT_SECONDS:
                return
            self._counting, self._since = True, 0
        counted: int | None = None
        try:
            counted = self._queue.depth(self._most)
        finally:
            with self._lock:
                self._counting, self._at = False, self._clock()
                if counted is not None:
                    self._open = counted + self._since
