"""Errors as `application/problem+json` (RFC 9457), each with a stable `type`, the request's id and what to do next."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import falcon
import orjson
import structlog
from pydantic import ValidationError
from ulid import ULID

from engine.errors import (
    AccessDenied,
    Conflict,
    HeadraceError,
    KeyReused,
    NotFound,
    Refused,
    Transient,
)
from engine.logs import get_logger

__all__ = [
    "MAX_SHOWN_NAME",
    "Problem",
    "RequestIds",
    "install",
    "invalid",
    "logged_path",
    "problem_body",
    "problem_headers",
    "request_id_of",
]

TYPE_BASE: Final = "urn:headrace:problem:"
RETRY_AFTER_SECONDS: Final = 5
MAX_FAULTS: Final = 20
"""Most faults that one problem lists."""

MAX_SHOWN_NAME: Final = 100
"""Most characters of a field's or parameter's name that a problem repeats."""

MAX_LOGGED: Final = 1000
METHODS: Final = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")

SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = get_logger()


class Problem(Exception):
    """An error with its HTTP status, a stable code, and a sentence."""

    def __init__(
        self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers or {}
        self.more = more


def request_id_of(given: str | None) -> str:
    """The client's request id if it is 1 to 64 letters, digits, dots, underscores and dashes; else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else str(ULID())


class RequestIds:
    """Middleware: gives each response `X-Request-ID` and the security headers, and logs it."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Set the id of the request, and the headers of its response."""
        resp.set_header("X-Request-ID", _identify(req))
        for name, value in SECURITY_HEADERS.items():
            resp.set_header(name, value)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Log the answer; successful reads and health checks only at debug level."""
        quiet = resp.status_code < 400 and req.method in ("GET", "HEAD")
        record = log.debug if quiet or req.path in ("/healthz", "/readyz") else log.info
        record("answered", action="request", method=req.method, path=logged_path(req.path), status=resp.status_code)


def logged_path(path: str) -> str:
    """The beginning of a path, as the log shows it: the key of an object may have 1024 bytes."""
    return path[:MAX_LOGGED]


def install(app: "falcon.App[Any, Any]") -> None:
    """Answer every error of the application as a problem."""
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _http)
    app.add_error_handler(HeadraceError, _ours)
    app.add_error_handler(Problem, _problem)


def _identify(req: falcon.Request) -> str:
    """The id of a request, given to it now if it has none: Falcon refuses some methods before any middleware runs."""
    if not hasattr(req.context, "request_id"):
        req.context.request_id = request_id_of(req.get_header("X-Request-ID"))
        # Every line that this thread logs until the answer carries the id.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request=req.context.request_id)
    return str(req.context.request_id)


def problem_body(problem: Problem, request_id: str) -> tuple[str, bytes]:
    """The title of a problem, and the whole problem as JSON."""
    title = falcon.util.code_to_http_status(problem.status).split(" ", 1)[1]
    fields = {"type": TYPE_BASE + problem.code, "title": title, "status": problem.status, "detail": problem.detail}
    return title, orjson.dumps(fields | {"requestId": request_id} | problem.more)


def problem_headers(problem: Problem, request_id: str) -> dict[str, str]:
    """The headers of an answer with a problem."""
    headers = {"Content-Type": "application/problem+json", "X-Request-ID": request_id, **SECURITY_HEADERS}
    if problem.status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return headers | dict(problem.headers)


def _answer(req: falcon.Request, resp: falcon.Response, problem: Problem) -> None:
    resp.status = problem.status
    resp.text = None
    _, body = problem_body(problem, _identify(req))
    if problem.status in (429, 503) and req.method != "HEAD":
        # An answer without a length ends the connection: a crowd that is turned away must not keep others out.
        resp.data, resp.stream = None, iter((body,))
    else:
        resp.data = body
    for name, value in problem_headers(problem, _identify(req)).items():
        resp.set_header(name, value)


def _problem(req: falcon.Request, resp: falcon.Response, error: Problem, params: dict[str, Any]) -> None:
    _answer(req, resp, error)


def _ours(req: falcon.Request, resp: falcon.Response, error: HeadraceError, params: dict[str, Any]) -> None:
    status, detail = 500, str(error)
    if isinstance(error, NotFound):
        status = 404
    elif isinstance(error, Conflict):
        status = 409
    elif isinstance(error, Refused | KeyReused):
        status = 422
    elif isinstance(error, Transient | AccessDenied):
        status = 503
        detail += "; then send the request again" if isinstance(error, Transient) else ""
        log.warning(str(error), action="request")
    else:
        log.error(str(error), action="request")
    _answer(req, resp, Problem(status, error.code, detail))


def invalid(error: ValidationError, kind: str, names: Sequence[str]) -> Problem:
    """A problem that lists the faults; `kind` is "field" or "parameter", and `names` are those that exist."""
    unknown = f"there is no such {kind}; the {kind}s are {', '.join(names)}"
    faults = [
        {
            "field": ".".join(map(str, fault["loc"]))[:MAX_SHOWN_NAME] or ("body" if kind == "field" else "query"),
            "message": unknown if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, "),
        }
        for fault in error.errors(include_url=False, include_input=False, include_context=False)[:MAX_FAULTS]
    ]
    detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
    if error.error_count() > MAX_FAULTS:
        detail += f"; and {error.error_count() - MAX_FAULTS} more"
    return Problem(422, "invalid_request", detail, errors=faults)


def _http(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: dict[str, Any]) -> None:
    status = error.status_code
    if error.headers:
        resp.set_headers(error.headers)
    if status == 404:
        detail = f"there is nothing at {req.path[:200]!r}: see /docs for the calls"
    elif status == 405:
        detail = f"{req.method} is not allowed at {req.path[:200]!r}: see the Allow header"
    elif req.method not in METHODS:
        detail = f"{req.method[:40]!r} is not a method of this API: use {', '.join(METHODS)}"
    else:
        detail = error.description or error.title or "the request cannot be handled"
    code = re.sub(r"[^a-z]+", "_", falcon.util.code_to_http_status(status).split(" ", 1)[1].lower())
    _answer(req, resp, Problem(status, code, detail))


def _unexpected(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]) -> None:
    log.error("the request failed", action="request", exc_info=error)
    detail = "something unexpected happened: try again, and if it persists tell the operator the request id"
    _answer(req, resp, Problem(500, "internal", detail))
