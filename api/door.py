"""Checks of a request before its body is received: waitress spools a whole body before it calls the application.

They keep callers who may not upload from filling the spool, and refuse an upload beyond the limit before its body is
sent. Whatever they, or waitress itself, refuse is answered with a problem, like errors of the application.
"""

import re
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Final

from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ThreadedTaskDispatcher, WSGITask
from waitress.utilities import Error

from api.auth import Guard, Head
from api.limits import LEAVE, Slots
from api.metrics import Durations
from api.operations import MAX_BODY_BYTES, Scope, check_encoding, check_form
from api.problems import Problem, logged_path, problem_body, problem_headers, request_id_of
from engine.logs import get_logger
from engine.settings import Settings

__all__ = ["open_door"]

UPLOAD: Final = "/upload"
HEALTH: Final = "/healthz"
UNKNOWN: Final = "unknown"

MAX_CHUNK_LINE_BYTES: Final = 1024
"""Longest line before a chunk of a body: the chunk's size, and extensions."""

MAX_TRAILER_BYTES: Final = 16 * 1024
"""Longest trailer after the last chunk."""

_REQUEST_LINE: Final = re.compile(rb"[^ ]+ [^ ]+(?: HTTP/[0-9]\.[0-9])?")

# A long run of blanks, or a header continued on another line, which a server may refuse (RFC 9112, 5.2).
_BLANKS: Final = re.compile(rb"[ \t]{100}|^[ \t]", re.MULTILINE)

log = get_logger()


class _Refusal(Error):  # type: ignore[misc]  # waitress has no types
    """An error response of waitress, with a problem as its body."""

    def __init__(self, problem: Problem, request_id: str) -> None:
        super().__init__(problem.detail)
        self.code = problem.status
        self._problem = problem
        self._id = request_id

    def to_response(self, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        """Status line, headers and body. The connection is closed afterwards, since a body may still be arriving."""
        title, body = problem_body(self._problem, self._id)
        headers = [*problem_headers(self._problem, self._id).items(), ("Connection", "close")]
        return f"{self.code} {title}", headers, body


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """Checks the head of a request as soon as it is complete."""

    settings: ClassVar[Settings]
    guard: ClassVar[Guard]
    durations: ClassVar[Durations]
    uploads: ClassVar[Slots]
    small: ClassVar[Adjustments]
    """For all requests but uploads: waitress's defaults with a smaller limit on the body."""

    _refusal: "_Refusal | None" = None
    give_back: "weakref.finalize[[], _Parser] | None" = None
    """Releases the slot of an upload, on the first call only."""

    def parse_header(self, header_plus: bytes) -> None:
        _check_head(header_plus)
        try:
            super().parse_header(header_plus)
        except ValueError:
            # From a length of thousands of digits, or an invalid address in the target.
            raise ParsingError("a number or an address in its head is invalid") from None
        if self.body_rcv is None:
            # Without a body, waitress would still send `100 Continue` and wait for one.
            self.expect_continue = False
        if self.version == "1.1" and "HOST" not in self.headers:
            raise ParsingError("it has no Host header")
        if "," in self.headers.get("HOST", ""):  # waitress joins the values of a repeated header
            raise ParsingError("it has more than one Host header")
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            # A proxy in front may go by the other of the two, and see the next request begin elsewhere.
            raise ParsingError("it has both Content-Length and Transfer-Encoding")
        if self.version != "1.1" and "TRANSFER_ENCODING" in self.headers:
            # Waitress would ignore it, and take the body for another request.
            raise ParsingError("it has Transfer-Encoding but is not HTTP/1.1")
        if self.proxy_netloc:
            self.headers["HOST"] = self.proxy_netloc  # which takes precedence over the header
        try:
            if self.command == "POST" and self._route() == UPLOAD:
                self._admit_upload()
            else:
                # Waitress checks a body against the limit in `adj`: the server's is for uploads only.
                self.adj = self.small
                if self.content_length or self.chunked:
                    self._admit_body()
        except Problem as problem:
            self._refuse(problem)

    def _route(self) -> str:
        """The route that the application, which ignores leading slashes, will choose: UPLOAD, else UNKNOWN."""
        return UPLOAD if getattr(self, "path", "").lstrip("/") == UPLOAD.lstrip("/") else UNKNOWN

    def _check_caller(self) -> None:
        """Raises Problem unless this caller may upload."""
        get = self.headers.get
        self.guard.check(Head(get("AUTHORIZATION"), get("ORIGIN"), get("HOST")), Scope.SUBMIT)

    def _admit_body(self) -> None:
        """Raises Problem for a body from an unknown caller: a crowd of them would fill the memory. Whether a known
        caller has the scope is left to the application."""
        try:
            self._check_caller()
        except Problem as problem:
            if problem.code != "forbidden":
                raise

    def _admit_upload(self) -> None:
        """Take a slot for an upload. Raises Problem if the upload is to be refused."""
        get = self.headers.get
        self._check_caller()
        check_encoding(get("CONTENT_ENCODING"))
        check_form(get("CONTENT_TYPE"))
        if self.content_length >= self.adj.max_request_body_size:
            raise _too_large(self.settings)
        self.uploads.take()
        # Released when the application is done or the request is over; at the latest when this is garbage-collected.
        self.give_back = weakref.finalize(self, self.uploads.give)

    def received(self, data: bytes) -> int:
        """Take in bytes of the request; returns how many. What waitress refuses is answered with a problem."""
        try:
            taken = int(super().received(data))
        except OSError as error:
            # Propagated, it would end the server: waitress would close the spool, which fails as well.
            _log_full("a body cannot be spooled", error)
            self._refuse(
                Problem(503, "no_room", f"the server cannot store the body ({error.strerror}): send it again later")
            )
            return len(data)
        line, trailer = (len(getattr(self.body_rcv, name, b"")) for name in ("control_line", "trailer"))
        if line > MAX_CHUNK_LINE_BYTES or trailer > MAX_TRAILER_BYTES:
            # Waitress scans all of it again with every piece that arrives.
            detail = "a chunk header or the trailer of the body is too long: send valid HTTP/1.1"
            self._refuse(Problem(400, "malformed_request", detail))
        elif self._refusal is not None:
            self.error = self._refusal  # waitress may have replaced it when it checked the size
        elif self.error is not None:
            self._refuse(_problem_of(self.error, self.settings, uploading=self.adj is not self.small))
        return taken if self.error is None else len(data)  # what follows a refused head is not another request

    def _refuse(self, problem: Problem) -> None:
        request_id = request_id_of(self.headers.get("X_REQUEST_ID"))
        self.error = self._refusal = _Refusal(problem, request_id)
        self.completed = True
        self.expect_continue = False  # or waitress would still ask the client for the body
        path = logged_path(getattr(self, "path", ""))
        log.info("refused", action="request", request=request_id, path=path, status=problem.status)
        # Counted here, since it never reaches the application, which counts all others.
        self.durations.count(getattr(self, "command", ""), self._route(), problem.status, 0.0)

    def close(self) -> None:
        """Free the spool and the slot of a request that is over."""
        with suppress(OSError):  # closing writes again what did not fit on a full disk
            super().close()
        self.leave()

    def leave(self) -> None:
        """Release the slot, if this is an upload."""
        if self.give_back is not None:
            self.give_back()


def _check_head(head: bytes) -> None:
    """Raises ParsingError for a head that would keep waitress from serving anybody for seconds or minutes: its patterns
    backtrack from each byte of a request line with more than three words, and of a run of blanks."""
    line, _, headers = head.partition(b"\r\n")
    if not _REQUEST_LINE.fullmatch(line.rstrip()):
        raise ParsingError("its first line is not METHOD TARGET HTTP/1.1")
    if _BLANKS.search(headers):
        raise ParsingError("a header has a hundred blanks in a row, or continues on another line")


class _Task(WSGITask):  # type: ignore[misc]
    """A request on its way to the application."""

    def set_close_on_finish(self) -> None:
        """Close the connection after this answer, unless waitress asks for that only because an answer without a body
        has no length."""
        bodiless = not self.wrote_header and not self.has_body and self.version == "1.1"
        if not bodiless or self.request.headers.get("CONNECTION", "").lower() == "close":
            super().set_close_on_finish()

    def get_environment(self) -> dict[str, Any]:
        environment: dict[str, Any] = super().get_environment()
        environment[LEAVE] = self.request.give_back
        if media := environment.get("CONTENT_TYPE"):
            kind, *parameters = media.split(";", 1)
            environment["CONTENT_TYPE"] = ";".join([kind.lower(), *parameters])  # the type is case-insensitive
        return environment


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection that frees its spool as soon as the client has gone, even in the middle of a body."""

    task_class = _Task

    def received(self, data: bytes) -> bool:
        refused = any(request.error for request in self.requests[-1:])
        # The connection closes once the refusal is sent: what still arrives is the unwanted body, and is dropped.
        return True if refused else bool(super().received(data))

    def handle_close(self) -> None:
        super().handle_close()
        if (request := self.request) is not None:
            request.close()
        # Without `requests_lock`, which this thread may hold: sending `100 Continue` to a client may end up here.
        for request in list(self.requests)[1:]:
            request.leave()  # it is queued behind the first, and its client is gone

    def _flush_some(self, do_close: bool = True) -> bool:
        # Waitress flushes without this lock once no request is left, but the thread that served the last one may still
        # be sending `100 Continue` for the next: the same bytes would be sent twice.
        with self.outbuf_lock:
            return bool(super()._flush_some(do_close))

    def write_soon(self, data: bytes) -> int:
        try:
            return int(super().write_soon(data))
        except OSError as error:
            # What a slow client has not read yet is buffered on disk. After an error, it may be incomplete there.
            _log_full("an answer cannot be kept until its client reads it", error)
            self.will_close = True
            self.server.pull_trigger()
            raise ClientDisconnected from error


def _log_full(what: str, error: OSError) -> None:
    message = f"{what}: free some room in the folder, or name another one in API_SPOOL_DIR"
    folder = tempfile.gettempdir()  # API_SPOOL_DIR, if that is set: `serve` makes it so
    log.error(message, action="request", folder=folder, cause=error.strerror)


def _too_large(settings: Settings) -> Problem:
    most = settings.api_max_upload_bytes
    detail = f"the file is larger than API_MAX_UPLOAD_BYTES={most} allows: send it with POST /uploads, as `headrace load` does"
    return Problem(413, "too_large", detail)


def _problem_of(error: Any, settings: Settings, *, uploading: bool) -> Problem:
    status = int(error.code)
    if status == 413 and uploading:
        return _too_large(settings)
    if status == 413:
        return Problem(413, "too_large", f"the body exceeds this call's limit of {MAX_BODY_BYTES} bytes: send less")
    if status == 431:
        return Problem(431, "headers_too_large", "the headers of the request are too large: send fewer or shorter ones")
    if error.body == "Bad URI":
        detail = "the path is not ASCII, or cannot be read: percent-encode it"
        return Problem(status, "malformed_request", detail)
    return Problem(status, "malformed_request", f"the request cannot be read ({error.body}): send valid HTTP/1.1")


def open_door(server: Any, settings: Settings, guard: Guard, durations: Durations) -> None:
    """Install these checks in a waitress server, with a timeout for stalled clients and a thread for `GET /healthz`."""

    class Parser(_Parser):
        pass

    class Channel(_Channel):
        parser_class = Parser

    def maintain(each: Any, real: Callable[[float], None], now: float) -> None:
        """Close also connections whose client has stopped reading an answer, which holds a thread; waitress closes only
        those without a request."""
        real(now)
        for channel in list(each.active_channels.values()):
            if channel.total_outbufs_len and channel.last_activity < now - each.adj.channel_timeout:
                channel.handle_close()

    # `GET /healthz` has a thread of its own: all others may be waiting for a database that hangs.
    health = ThreadedTaskDispatcher()
    health.set_thread_count(1)

    def add_task(real: Callable[[Any], None], channel: Any) -> None:
        asked = getattr(channel.requests[0], "path", "") == HEALTH
        (health.add_task if asked else real)(channel)

    servers = [each for each in getattr(server, "map", {}).values() if hasattr(each, "channel_class")] or [server]
    small = Adjustments(max_request_body_size=MAX_BODY_BYTES + 1)
    Parser.settings, Parser.guard, Parser.durations, Parser.small = settings, guard, durations, small
    Parser.uploads = Slots(settings.api_max_uploads, 503, "uploads")
    for each in servers:
        each.channel_class = Channel
        each.maintenance = partial(maintain, each, each.maintenance)
        each.add_task = partial(add_task, each.add_task)
