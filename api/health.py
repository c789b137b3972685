"""Health checks: whether the process is alive, and whether MongoDB and S3 answer it."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import falcon

from api.answers import HealthBody
from api.operations import Answer, operation
from api.problems import Problem
from engine.errors import HeadraceError
from engine.logs import get_logger

__all__ = ["Health", "Ready"]

PATIENCE_SECONDS: Final = 5.0
"""How long a check may take, from its start. One that has hung for longer is reported at once."""

log = get_logger()


class Health:
    """GET /healthz: this process answers; nothing else is checked."""

    @operation(
        summary="Whether this process answers",
        group="health",
        scope=None,
        answers={200: Answer("It answers", HealthBody)},
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 always."""
        resp.media = {"status": "ok"}


class Ready:
    """GET /readyz: whether MongoDB and S3 answer.

    Args:
        checks: by server name, a function that raises a HeadraceError unless the server answers.
    """

    def __init__(self, checks: Mapping[str, Callable[[], None]]) -> None:
        self._checks = checks
        self._pool = ThreadPoolExecutor(len(checks), thread_name_prefix="ready")
        self._lock = threading.Lock()
        self._under_way: dict[str, tuple[Future[None], float]] = {}  # and when it began, on the monotonic clock

    @operation(
        summary="Whether MongoDB and S3 answer",
        group="health",
        scope=None,
        answers={200: Answer("Both answer", HealthBody)},
        errors=(503,),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 if both answer, else 503, which says which does not; within about `PATIENCE_SECONDS`."""
        with self._lock:
            for name, check in self._checks.items():
                # A check that hangs is not started again, however often this is called: the other one has a thread left.
                if name not in self._under_way or self._under_way[name][0].done():
                    self._under_way[name] = self._pool.submit(check), time.monotonic()
            asked = dict(self._under_way)
        for future, began in asked.values():
            wait([future], max(0, began + PATIENCE_SECONDS - time.monotonic()))
        states = {name: _state_of(future) for name, (future, _) in asked.items()}
        if bad := [f"{name}: {state}" for name, state in states.items() if state != "ok"]:
            raise Problem(503, "not_ready", "; ".join(bad), checks=states)
        resp.media = {"status": "ready", **states}


def _state_of(future: Future[None]) -> str:
    if not future.done():
        return f"no answer within {PATIENCE_SECONDS:g} seconds: make sure it is running and reachable"
    error = future.exception()
    if error is None:
        return "ok"
    if isinstance(error, HeadraceError):
        return str(error)
    log.error("unexpected error in a readiness check", action="request", exc_info=error)
    return f"the check failed ({type(error).__name__}): see the log"
