"""Limits on concurrent work: beyond them a client is told when to try again, and costs nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import falcon

from api.operations import Wait, operation_of
from api.problems import Problem
from engine.control.queue import Queue
from engine.errors import Conflict, KeyReused, Refused

__all__ = ["LEAVE", "OpenJobsLimit", "S3Calls", "Slots", "gone_of"]

COUNT_SECONDS: Final = 1.0
"""How long a count of the open jobs is reused."""

SLOW_SECONDS: Final = 5.0
"""A call that has waited for S3 for this long shows that S3 is in trouble."""

TURN_SECONDS: Final = 2.0
"""How long a call waits for its turn at S3: many may come at once, and most take milliseconds."""

LEAVE: Final = "headrace.leave"
"""Key in the WSGI environment of the function that releases an upload's slot, for the next upload to be sent."""


def gone_of(req: falcon.Request) -> Callable[[], bool]:
    """A function that tells whether the client of a request has left: nothing is to be held for it after that."""
    return cast("Callable[[], bool]", req.env.get("waitress.client_disconnected", lambda: False))


class Slots:
    """A limited number of slots: `take` one, and `give` it back.

    Args:
        most: how many there are.
        status: HTTP status of the problem when none is left, 429 or 503.
        what: a plural noun for the detail of that problem, such as "downloads".
    """

    def __init__(self, most: int, status: int, what: str) -> None:
        self._free = threading.Semaphore(most)
        self._status = status
        self._what = (
            f"{most} {what} are already under way, which is the limit: try again shortly"
            if most
            else f"this server takes no {what}: ask without waiting"
        )

    def take(self) -> None:
        """Take a slot. Raises Problem if none is left."""
        if not self._free.acquire(blocking=False):
            raise Problem(self._status, "busy", self._what)

    def give(self) -> None:
        """Give a slot back."""
        self._free.release()


class S3Calls:
    """Middleware: keeps an S3 that does not answer from taking the threads of calls that do not need it.

    Args:
        most: how many calls may wait for S3 at a time; others wait up to `TURN_SECONDS` for their turn.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._free = threading.Semaphore(most)
        self._clock = clock
        self._began: dict[int, float] = {}  # by request; only calls that a healthy S3 answers at once
        self._held: set[int] = set()
        self._lock = threading.Lock()

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Take a turn. Raises Problem if earlier calls are not answered, or if no turn comes up in time."""
        operation = operation_of(resource, req.method)
        if operation is None or operation.waits_for_s3 is None:
            return
        with self._lock:
            now = self._clock()
            slow = sum(now - began > SLOW_SECONDS for began in self._began.values())
        if 2 * slow >= self._most:
            raise Problem(503, "unavailable", "S3 or MongoDB does not answer earlier calls: send this again later")
        if not self._free.acquire(timeout=TURN_SECONDS):
            what = f"{self._most} calls that need S3 are already under way, which is the limit"
            raise Problem(503, "busy", f"{what}: try again shortly, or raise API_THREADS")
        with self._lock:
            self._held.add(id(req))
            if operation.waits_for_s3 is Wait.BRIEF:
                self._began[id(req)] = self._clock()

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Give the turn back."""
        with self._lock:
            held = id(req) in self._held
            self._held.discard(id(req))
            self._began.pop(id(req), None)
        if held:
            self._free.release()


class OpenJobsLimit:
    """Bounds the queue. Open jobs are counted at most once a second, and those let in since are added."""

    def __init__(self, queue: Queue, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._most = most
        self._clock = clock
        self._at = float("-inf")
        self._open = 0
        self._counting = False
        self._going = 0  # jobs that are being created: a count may miss them
        self._since = 0  # jobs created since the last count began
        self._lock = threading.Lock()

    @contextmanager
    def let_in(self, jobs: int) -> Iterator[None]:
        """A context in which `jobs` jobs are created or reopened. Raises Problem if they would exceed the limit on open jobs."""
        if jobs > self._most:
            raise Problem(
                422,
                "too_many_jobs",
                f"{jobs} jobs are more than may be open at once (API_MAX_OPEN_JOBS={self._most}): submit fewer at a "
                "time",
            )
        self._count()
        with self._lock:
            if self._open + self._going + jobs > self._most:
                raise Problem(
                    503,
                    "queue_full",
                    f"{jobs} more would exceed {self._most} open jobs (API_MAX_OPEN_JOBS): submit them when some have "
                    "ended",
                )
            self._going += jobs
        created = jobs
        try:
            yield
        except (Conflict, KeyReused, Refused):  # after any other error, some may have been created
            created = 0
            raise
        finally:
            with self._lock:
                self._going -= jobs
                self._open += created
                self._since += created

    def _count(self) -> None:
        """Count again if that is due. One request counts while the others use the previous count: a database that does
        not answer must not make them queue up behind each other."""
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
