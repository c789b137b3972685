"""Errors as `application/problem+json` (RFC 9457), each with a stable `type`, the request's id and what to do next."""

import re
from collections.abc import Mapping
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

__all__ = ["Problem", "RequestIds", "install"]

TYPE_BASE: Final = "urn:headrace:problem:"
RETRY_AFTER_SECONDS: Final = 5

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


class RequestIds:
    """Middleware: each response carries `X-Request-ID`, that of the request where it is a plain one."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Take or draw the id."""
        given = req.get_header("X-Request-ID") or ""
        req.context.request_id = given if _REQUEST_ID.fullmatch(given) else str(ULID())
        # Every line that is logged in this thread until the answer carries it.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request=req.context.request_id)
        resp.set_header("X-Request-ID", req.context.request_id)
        for name, value in SECURITY_HEADERS.items():
            resp.set_header(name, value)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: object, ok: bool) -> None:
        """Log what was answered; the quiet checks only at debug."""
        say = log.debug if req.path in ("/healthz", "/readyz") or req.method == "GET" else log.info
        say("answered", action="request", method=req.method, path=req.path, status=resp.status_code)


def install(app: "falcon.App[Any, Any]") -> None:
    """Answer every error of the application as a problem."""
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _http)
    app.add_error_handler(HeadraceError, _ours)
    app.add_error_handler(ValidationError, _invalid)
    app.add_error_handler(Problem, _problem)


def _id(req: falcon.Request) -> str:
    return str(getattr(req.context, "request_id", ""))


def _answer(req: falcon.Request, resp: falcon.Response, problem: Problem) -> None:
    resp.status = problem.status
    resp.content_type = "application/problem+json"
    resp.text = None
    resp.data = orjson.dumps(
        {
            "type": TYPE_BASE + problem.code,
            "title": falcon.util.code_to_http_status(problem.status).split(" ", 1)[1],
            "status": problem.status,
            "detail": problem.detail,
            "requestId": _id(req),
            **problem.more,
        }
    )
    for name, value in problem.headers.items():
        resp.set_header(name, value)
    if problem.status in (429, 503):
        resp.set_header("Retry-After", str(RETRY_AFTER_SECONDS))


def _problem(req: falcon.Request, resp: falcon.Response, error: Problem, params: dict[str, Any]) -> None:
    _answer(req, resp, error)


def _ours(req: falcon.Request, resp: falcon.Response, error: HeadraceError, params: dict[str, Any]) -> None:
    status = 500
    if isinstance(error, NotFound):
        status = 404
    elif isinstance(error, Conflict):
        status = 409
    elif isinstance(error, Refused | KeyReused):
        status = 422
    elif isinstance(error, Transient | AccessDenied):
        status = 503
        log.warning(str(error), action="request")
    else:
        log.error(str(error), action="request")
    _answer(req, resp, Problem(status, error.code, str(error)))


def _invalid(req: falcon.Request, resp: falcon.Response, error: ValidationError, params: dict[str, Any]) -> None:
    faults = [
        {"field": ".".join(map(str, fault["loc"])) or "body", "message": fault["msg"].removeprefix("Value error, ")}
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    detail = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults)
    _answer(req, resp, Problem(422, "invalid_request", detail, errors=faults))


def _http(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: dict[str, Any]) -> None:
    status = error.status_code
    if error.headers:
        resp.set_headers(error.headers)
    if status == 404:
        detail = f"there is nothing at {req.path[:200]!r}: see the README for the calls there are"
    elif status == 405:
        detail = f"{req.method} is not possible at {req.path[:200]!r}: see the Allow header"
    else:
        detail = error.description or error.title or "the request cannot be handled"
    code = re.sub(r"[^a-z]+", "_", falcon.util.code_to_http_status(status).split(" ", 1)[1].lower())
    _answer(req, resp, Problem(status, code, detail))


def _unexpected(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]) -> None:
    log.error("the request failed", action="request", exc_info=error)
    detail = "something unexpected happened: try again, and tell the operator the request id if it stays"
    _answer(req, resp, Problem(500, "internal", detail))
