"""Waiting for a job to change, at little cost: ETags, long polls, and server-sent events.

A client that waits holds a thread, so only a limited number may wait at a time; others are told to try again later.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import falcon
import orjson

from api.limits import Slots, gone_of
from api.operations import Answer, Scope, operation
from api.views import job_status
from engine.control.queue import Queue
from engine.errors import HeadraceError
from engine.model import TERMINAL

__all__ = ["EVENTS_SECONDS", "HEARTBEAT_SECONDS", "REQUEST_HEADERS", "RESPONSE_HEADERS", "Events", "Watch", "tag_of"]

MAX_WAIT_SECONDS: Final = 60
LOOK_SECONDS: Final = 0.25
"""How often a job that a client waits for is read."""

EVENTS_SECONDS: Final = 600.0
"""How long one event stream lasts; clients then reconnect by themselves."""

HEARTBEAT_SECONDS: Final = 5.0
"""How long a stream may be silent before it sends a comment."""

RETRY_MILLISECONDS: Final = 3000
"""The delay before reconnecting that an event stream tells its client."""

REQUEST_HEADERS: Final[Mapping[str, str]] = {
    "Prefer": "wait=N: answer when the job has ended, no longer matches If-None-Match, or after N seconds (at most 60)",
    "If-None-Match": "The ETag of an earlier answer",
}

RESPONSE_HEADERS: Final[Mapping[str, str]] = {
    "ETag": "ETag of this state",
    "Preference-Applied": "The wait that was granted",
}

_WAIT: Final = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,18})\"?\s*(?:$|[,;])", re.IGNORECASE)
ANY: Final = "*"
"""In If-None-Match: matches any state."""

Look = Callable[[], tuple[dict[str, Any], bool]]
"""Reads a job: its body as clients see it, and whether the job has ended."""


class Watch:
    """Answers calls that may wait.

    Args:
        queue: the jobs.
        slots: how many may wait at a time.
        stopping: set when the process is to stop; all waits then end.
    """

    def __init__(self, queue: Queue, slots: Slots, stopping: threading.Event) -> None:
        self._queue = queue
        self.slots = slots
        self.stopping = stopping

    def status(self, job_id: str) -> tuple[dict[str, Any], bool]:
        """A job as clients see it, and whether it has ended."""
        job = self._queue.get(job_id)
        return dict(job_status(job)), job.state in TERMINAL

    def answer(self, req: falcon.Request, resp: falcon.Response, job_id: str, look: Look) -> None:
        """Answer with what `look` returns, or 304: at once, or after the wait that the client prefers."""
        known = _known(req)
        body, ended = look()
        tag = tag_of(body)
        if ANY in known:
            known = {tag}
        seconds = _wait(req)
        if seconds and not ended and (not known or tag in known):
            self.slots.take()
            req.context.waited = True
            gone = gone_of(req)
            try:
                seen, end = "", time.monotonic() + seconds
                while time.monotonic() < end and not ended and (not known or tag in known) and not gone():
                    if self.stopping.wait(min(LOOK_SECONDS, max(end - time.monotonic(), 0))):
                        break
                    # `look` may read all of the job's ranges. It is called only when the job has changed, and once at
                    # the end, since what the job waits for may change by itself.
                    before, seen = seen, tag_of(self.status(job_id)[0])
                    if seen != before:
                        body, ended = look()
                        tag = tag_of(body)
            finally:
                self.slots.give()
            if not ended and not gone():
                body, ended = look()
                tag = tag_of(body)
        if seconds is not None:
            resp.set_header("Preference-Applied", f"wait={seconds}")
        resp.cache_control = ["no-cache"]
        # Weak: the estimate of the time left may differ.
        weak = falcon.ETag(tag)
        weak.is_weak = True
        resp.etag = weak.dumps()
        if tag in known:
            resp.status = 304
        else:
            resp.media = body


def tag_of(body: Mapping[str, Any]) -> str:
    """The ETag of an answer, without quotes. `secondsLeft`, only an estimate, does not count."""
    same = dict(body) | {"progress": {k: v for k, v in body["progress"].items() if k != "secondsLeft"}}
    return hashlib.sha256(orjson.dumps(same)).hexdigest()[:32]


def _known(req: falcon.Request) -> set[str]:
    try:
        return {str(tag) for tag in req.if_none_match or ()}
    except ValueError:
        return set()


def _wait(req: falcon.Request) -> int | None:
    match = _WAIT.search(req.get_header("Prefer") or "")
    return min(int(match.group(1)), MAX_WAIT_SECONDS) if match else None


class Events:
    """GET /jobs/{jobId}/events."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @operation(
        summary="A job's progress as server-sent events, until it ends",
        group="jobs",
        scope=Scope.READ,
        headers={"Last-Event-ID": "The id of the last event received: it is not sent again"},
        answers={
            200: Answer(
                "Events `progress`, then one `end`, each with the job as data; or `failed` with a code and a sentence",
                str,
                "text/event-stream",
            ),
            204: Answer("The job has ended, and Last-Event-ID is that of its `end` event: nothing more will come"),
        },
        errors=(404, 409, 429),
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, job_id: str) -> None:
        """200 with a stream; 204, after which a browser does not reconnect, if the client has the `end` event."""
        body, ended = self._watch.status(job_id)  # 404 before the stream begins
        known = req.get_header("Last-Event-ID") or ""
        if ended and tag_of(body) == known:
            resp.status = 204
            return
        self._watch.slots.take()
        resp.content_type = "text/event-stream"
        resp.cache_control = ["no-store"]
        resp.stream = _Stream(self._watch, job_id, known, gone_of(req))


class _Stream:
    """The events for one client. The server calls `close` when the client has left, or the stream has ended."""

    def __init__(self, watch: Watch, job_id: str, known: str, gone: Callable[[], bool]) -> None:
        self._watch = watch
        self._job_id = job_id
        self._tag = known
        self._gone = gone
        self._open = True
        self._begun = False
        self._ended = False
        self._until = time.monotonic() + EVENTS_SECONDS
        self._said_at = time.monotonic()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        if not self._begun:
            self._begun = True
            return b"retry: %d\n\n" % RETRY_MILLISECONDS
        while not (self._ended or self._gone() or self._watch.stopping.is_set()) and time.monotonic() < self._until:
            try:
                body, ended = self._watch.status(self._job_id)
            except HeadraceError as error:
                self._ended = True
                return b"event: failed\ndata: %b\n\n" % orjson.dumps({"code": error.code, "detail": str(error)})
            tag = tag_of(body)
            if ended or tag != self._tag:
                self._tag, self._ended, self._said_at = tag, ended, time.monotonic()
                name = b"end" if ended else b"progress"
                return b"id: %b\nevent: %b\ndata: %b\n\n" % (self._tag.encode(), name, orjson.dumps(body))
            if time.monotonic() - self._said_at >= HEARTBEAT_SECONDS:
                # A client whose machine has vanished closes no connection: only a write reveals that.
                self._said_at = time.monotonic()
                return b": still here\n\n"
            self._watch.stopping.wait(LOOK_SECONDS)
        raise StopIteration

    def close(self) -> None:
        if self._open:
            self._open = False
            self._watch.slots.give()
