"""Is the process alive, and do MongoDB and S3 answer it?"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import falcon

from api.answers import HealthBody
from api.operations import Answer, operation
from api.problems import Problem
from engine.errors import HeadraceError

__all__ = ["Health", "Ready"]

PATIENCE_SECONDS: Final = 5.0
"""How long a check may take, from its beginning: of one that hangs, whoever asks later is told at once."""


class Health:
    """GET /healthz: this process answers; nothing else is touched."""

    @operation(
        summary="Whether this process answers",
        group="health",
        scope=None,
        answers={200: Answer("It does", HealthBody)},
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 always."""
        resp.media = {"status": "ok"}


class Ready:
    """GET /readyz: whether MongoDB and S3 answer.

    Args:
        checks: by name, what raises a HeadraceError unless one answers.
    """

    def __init__(self, checks: Mapping[str, Callable[[], None]]) -> None:
        self._checks = checks
        self._pool = ThreadPoolExecutor(len(checks), thread_name_prefix="ready")
        self._under_way: dict[str, tuple[Future[None], float]] = {}  # and when they began

    @operation(
        summary="Whether MongoDB and S3 answer",
        group="health",
        scope=None,
        answers={200: Answer("Both do", HealthBody)},
        errors=(503,),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 when both answer, else a problem that says which does not; within a few seconds."""
        for name, check in self._checks.items():
            # One that hangs is asked once, however often this is called.
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
        return f"no answer within {PATIENCE_SECONDS:g} seconds: see that it runs and can be reached"
    error = future.exception()
    if error is None:
        return "ok"
    return str(error) if isinstance(error, HeadraceError) else f"the check failed ({type(error).__name__}): see the log"
