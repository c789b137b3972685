"""Declares what each call takes and returns, once: for validation, for OpenAPI, and for the check of scopes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import Any, Final, TypeVar
from urllib.parse import unquote_to_bytes

import falcon
import orjson
from pydantic import BaseModel, ValidationError

from api.problems import MAX_SHOWN_NAME, Problem, invalid

__all__ = [
    "MAX_BODY_BYTES",
    "Answer",
    "Operation",
    "RefuseUnexpected",
    "Scope",
    "Wait",
    "body_of",
    "check_encoding",
    "check_form",
    "not_a_form",
    "operation",
    "operation_of",
    "query_of",
]

MAX_BODY_BYTES: Final = 1024 * 1024
"""Largest body of any call but an upload."""

MAX_FIELDS: Final = 50
"""Most fields or parameters in one request: no call takes this many, and the unknown ones are reported one by one."""

Model = TypeVar("Model", bound=BaseModel)
Responder = TypeVar("Responder", bound=Callable[..., None])


class Scope(StrEnum):
    """What a token may do."""

    READ = "read"  # look at jobs, files, rejects, workers, metrics
    SUBMIT = "submit"  # upload, submit, cancel, retry
    ADMIN = "admin"  # delete, pause and resume; and all of the above


class Wait(Enum):
    """How long a call waits for a healthy S3."""

    BRIEF = auto()  # S3 answers at once
    LONG = auto()  # S3 has much to do, such as assembling an object from its parts


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a call: its meaning, the type of its body, its media type, and its own headers with their meanings.

    `other_media` is a media type that the answer may have instead, with a body of plain bytes.
    """

    what: str
    body: Any = None
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    other_media: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    `scope` is None for a call that is open to all. `errors` are the statuses of its problems besides those that any
    call may have. `waits_for_s3` is set if the call waits for S3, and says for how long.
    """

    summary: str
    group: str
    scope: Scope | None
    answers: Mapping[int, Answer]
    errors: tuple[int, ...] = ()
    body: Any = None
    body_media: str = "application/json"
    query: type[BaseModel] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    waits_for_s3: Wait | None = None


def operation(**more: Any) -> Callable[[Responder], Responder]:
    """Decorate a responder with what it takes and returns; the arguments are those of `Operation`."""
    described = Operation(**more)

    def mark(responder: Responder) -> Responder:
        responder.operation = described  # type: ignore[attr-defined]
        return responder

    return mark


def operation_of(resource: object, method: str) -> Operation | None:
    """The declaration of a resource's method; None if there is none."""
    found: Operation | None = getattr(getattr(resource, f"on_{method.lower()}", None), "operation", None)
    return found


def body_of(req: falcon.Request, model: type[Model]) -> Model:
    """The request's JSON body, validated; an empty body counts as `{}`.

    Raises Problem: the body is too large, compressed, not JSON, or invalid for `model`.
    """
    raw = _whole_body(req)
    if not raw.strip():
        return _checked(model, {}, "field")
    try:
        given = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Problem(400, "bad_json", f"the body is not JSON: {error}: send a JSON object, or no body") from None
    return _checked(model, given, "field")


def _whole_body(req: falcon.Request) -> bytes:
    check_encoding(req.get_header("Content-Encoding"))
    raw: bytes = req.bounded_stream.read(MAX_BODY_BYTES + 1)
    if len(raw) > MAX_BODY_BYTES:
        raise Problem(413, "too_large", f"the body exceeds this call's limit of {MAX_BODY_BYTES} bytes: send less")
    return raw


def query_of(req: falcon.Request, model: type[Model]) -> Model:
    """The request's query, validated. Raises Problem, also for a parameter that is unknown, given twice or not UTF-8."""
    try:
        unquote_to_bytes(req.query_string).decode()
    except UnicodeDecodeError:
        # Falcon would replace what it cannot decode, and the filter would match nothing.
        detail = "the query is not UTF-8: send it as percent-encoded UTF-8"
        raise Problem(422, "invalid_request", detail) from None
    if twice := [name for name, value in req.params.items() if isinstance(value, list)]:
        raise Problem(422, "invalid_request", f"{twice[0][:MAX_SHOWN_NAME]}: send this parameter only once")
    return _checked(model, req.params, "parameter", strict=False)


class RefuseUnexpected:
    """Middleware: refuses parameters and bodies that a call does not take. Otherwise `?validate=true` on POST /process, or
    options sent to a retry, would be silently ignored."""

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raises Problem for parameters or a body that the call does not take."""
        operation = operation_of(resource, req.method)
        if operation is None or operation.scope is None:
            return
        if operation.query is None and req.params:
            name = next(iter(req.params))[:MAX_SHOWN_NAME]
            json = operation.body is not None and operation.body_media == falcon.MEDIA_JSON
            fields = ": its options are fields of a JSON body" if json else ""
            raise Problem(422, "invalid_request", f"{name}: this call takes no parameters{fields}")
        if operation.body is None and _whole_body(req).strip() not in (b"", b"{}"):
            raise Problem(422, "invalid_request", "this call takes no body: send it without one")


def check_encoding(encoding: str | None) -> None:
    """Raises Problem if the Content-Encoding says that the body is encoded: nothing here decodes it."""
    if encoding and encoding.strip().lower() != "identity":
        detail = f"a body with Content-Encoding {encoding[:40]!r} is not accepted: send it plain, without that header"
        raise Problem(415, "encoded_body", detail)


def check_form(media_type: str | None) -> None:
    """Raises Problem unless the Content-Type says that the body is a multipart form."""
    if (media_type or "").split(";", 1)[0].strip().lower() != "multipart/form-data":
        raise not_a_form()


def not_a_form() -> Problem:
    """The problem for a body that is not a multipart form, or not declared as one."""
    return Problem(415, "not_a_form", "send the file as multipart/form-data, in a part named `file`")


def _checked(model: type[Model], given: object, kind: str, *, strict: bool | None = None) -> Model:
    if not isinstance(given, dict):
        raise Problem(
            422, "invalid_request", "the body is JSON but not an object: send {…} with the fields of this call"
        )
    if len(given) > MAX_FIELDS:
        raise Problem(
            422, "invalid_request", f"{len(given)} {kind}s are more than any call takes: see /docs for the valid ones"
        )
    try:
        return model.model_validate(given, strict=strict)
    except ValidationError as error:
        names = [field.alias or name for name, field in model.model_fields.items()]
        raise invalid(error, kind, names) from None
