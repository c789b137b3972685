"""What a call takes and gives, said once: it is checked, described in OpenAPI, and guarded by scope from here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import Any, Final, TypeVar

import falcon
import orjson
from pydantic import BaseModel, ValidationError

from api.problems import MAX_NAME_LENGTH, Problem, invalid

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

MAX_FIELDS: Final = 50
"""Fields or parameters of one request that are looked at: each of them that is not known is told, and they are few."""

Model = TypeVar("Model", bound=BaseModel)
Responder = TypeVar("Responder", bound=Callable[..., None])


class Scope(StrEnum):
    """What a token may do."""

    READ = "read"  # look at jobs, files, rejects, workers, metrics
    SUBMIT = "submit"  # upload, submit, cancel, retry
    ADMIN = "admin"  # delete, pause and resume; and all of the above


class Wait(Enum):
    """How long a call waits for an S3 that is well."""

    BRIEF = auto()  # it answers at once
    LONG = auto()  # it has much to do, as to make an object of its parts


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a call: what it means, its body's type, its media type, and headers of its own with their meaning.

    `other_media` is a second media type that it may have instead, as plain bytes.
    """

    what: str
    body: Any = None
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    other_media: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    `scope` None: open to all. `errors` are the statuses of its problems, beside those that any call may have. `waits_for_s3`
    tells that it ends no sooner than S3 answers, and how soon that is.
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
    """Say of a responder what it takes and gives; the arguments are those of `Operation`."""
    described = Operation(**more)

    def mark(responder: Responder) -> Responder:
        responder.operation = described  # type: ignore[attr-defined]
        return responder

    return mark


def operation_of(resource: object, method: str) -> Operation | None:
    """What was said of a resource's method; None where it has none."""
    found: Operation | None = getattr(getattr(resource, f"on_{method.lower()}", None), "operation", None)
    return found


def body_of(req: falcon.Request, model: type[Model]) -> Model:
    """The request's JSON, checked; an empty body counts as `{}`.

    Raises Problem: it is too large, compressed, no JSON, or not what `model` takes.
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
        raise Problem(413, "too_large", f"the body of this call has at most {MAX_BODY_BYTES} bytes")
    return raw


def query_of(req: falcon.Request, model: type[Model]) -> Model:
    """The request's query, checked. Raises Problem, also for a name that is not known, or stands there twice."""
    if twice := [name for name, value in req.params.items() if isinstance(value, list)]:
        raise Problem(
            422, "invalid_request", f"{twice[0][:MAX_NAME_LENGTH]}: this parameter is taken once: send one of them"
        )
    return _checked(model, req.params, "parameter", strict=False)


class RefuseUnexpected:
    """Middleware: refuses parameters and bodies that a call does not take. Otherwise `?validate=true` on POST /process, or
    options sent to a retry, would be ignored without a word."""

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raises Problem."""
        operation = operation_of(resource, req.method)
        if operation is None or operation.scope is None:
            return
        if operation.query is None and req.params:
            name = next(iter(req.params))[:MAX_NAME_LENGTH]
            json = operation.body is not None and operation.body_media == falcon.MEDIA_JSON
            fields = ": its options are fields of a JSON body" if json else ""
            raise Problem(422, "invalid_request", f"{name}: this call takes no parameters{fields}")
        if operation.body is None and _whole_body(req).strip() not in (b"", b"{}"):
            raise Problem(422, "invalid_request", "this call takes no body: send it without one")


def check_encoding(encoding: str | None) -> None:
    """Raises Problem where a body is encoded as its Content-Encoding says: nothing here decodes it."""
    if encoding and encoding.strip().lower() != "identity":
        detail = f"a body with Content-Encoding {encoding[:40]!r} is not accepted: send it plain, without that header"
        raise Problem(415, "encoded_body", detail)


def check_form(media_type: str | None) -> None:
    """Raises Problem where a body is no form, as its Content-Type says."""
    if (media_type or "").split(";", 1)[0].strip().lower() != "multipart/form-data":
        raise not_a_form()


def not_a_form() -> Problem:
    """What is told of a body that is no form, or not said to be one."""
    return Problem(415, "not_a_form", "send the file as multipart/form-data, in a part named `file`")


def _checked(model: type[Model], given: object, kind: str, *, strict: bool | None = None) -> Model:
    if not isinstance(given, dict):
        raise Problem(422, "invalid_request", "the body is JSON, but no object: send {…} with the fields of this call")
    if len(given) > MAX_FIELDS:
        raise Problem(
            422, "invalid_request", f"{len(given)} {kind}s are more than any call takes: see /docs for those there are"
        )
    try:
        return model.model_validate(given, strict=strict)
    except ValidationError as error:
        names = [field.alias or name for name, field in model.model_fields.items()]
        raise invalid(error, kind, names) from None
