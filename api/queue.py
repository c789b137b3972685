"""The queue as a whole: pause, resume, and the workers that drain it."""

from typing import Any, cast

import falcon

from api.answers import QueueState, WorkerBody, WorkerPage
from api.operations import Answer, Scope, operation
from engine.control.history import History
from engine.control.queue import Queue
from engine.control.stats import live
from engine.control.store import Store

__all__ = ["Pause", "QueueNow", "Resume", "Workers"]


def _state(queue: Queue, history: History) -> QueueState:
    backlog = history.backlog()
    return {
        "paused": queue.paused(),
        "jobs": {state.value: count for state, count in backlog.states.items()},
        "oldestSeconds": round(backlog.oldest_seconds, 3),
    }


class QueueNow:
    """GET /queue."""

    def __init__(self, queue: Queue, history: History) -> None:
        self._queue = queue
        self._history = history

    @operation(
        summary="Whether the queue is paused, and its jobs by state",
        group="queue",
        scope=Scope.READ,
        answers={200: Answer("The queue", QueueState)},
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 with the state of the queue."""
        resp.media = _state(self._queue, self._history)


class Pause:
    """POST /queue/pause."""

    def __init__(self, queue: Queue, history: History) -> None:
        self._queue = queue
        self._history = history

    @operation(
        summary="Start no more ranges until the queue is resumed; those under way finish",
        group="queue",
        scope=Scope.ADMIN,
        answers={200: Answer("The queue", QueueState)},
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200; safe to repeat."""
        self._queue.pause()
        resp.media = _state(self._queue, self._history)


class Resume:
    """POST /queue/resume."""

    def __init__(self, queue: Queue, history: History) -> None:
        self._queue = queue
        self._history = history

    @operation(
        summary="Resume after a pause",
        group="queue",
        scope=Scope.ADMIN,
        answers={200: Answer("The queue", QueueState)},
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200; safe to repeat."""
        self._queue.resume()
        resp.media = _state(self._queue, self._history)


class Workers:
    """GET /workers."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @operation(
        summary="The workers that are alive: what each does, how fast, and where its time goes",
        group="queue",
        scope=Scope.READ,
        answers={200: Answer("The workers", WorkerPage)},
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 with what each worker last reported, within the last few seconds."""
        fields = ("host", "slot", "pid", "doing", "rate", "memory", "memoryPeak", "counts")
        workers: list[Any] = [
            {"name": found["_id"]} | {name: found[name] for name in fields} for found in live(self._store)
        ]
        body: WorkerPage = {"workers": cast("list[WorkerBody]", workers)}
        resp.media = body
