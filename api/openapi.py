"""The OpenAPI 3.1 document, built from the declaration of each call, and a page to read it that needs no internet."""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import falcon
import orjson
from pydantic import TypeAdapter, ValidationError

from api.answers import ProblemBody
from api.operations import Answer, Operation, operation, operation_of
from api.problems import Problem

__all__ = ["Docs", "OpenApi", "Route"]

Route = tuple[str, object, Mapping[str, str]]
"""A Falcon path template, its resource, and the meanings of its parameters by name."""

METHODS: Final = ("get", "post", "delete")

_REFS: Final = "#/components/schemas/{model}"

_PROBLEMS: Final = {
    400: "The request cannot be read",
    401: "A token is needed",
    403: "The token may not do this",
    404: "There is no such resource",
    409: "Its current state does not allow this",
    413: "The request is too large",
    415: "The body is of the wrong type",
    422: "A value is wrong; the problem names it",
    429: "Too many such requests at once: try again later",
    431: "The headers are too large",
    500: "Something unexpected happened",
    503: "It cannot be done now: try again later",
}

_HEADERS: Final[dict[str, dict[str, Any]]] = {
    "Idempotency-Key": {"type": "string", "pattern": "^[!-~]{1,200}$", "minLength": 1, "maxLength": 200},
    "If-None-Match": {"type": "string"},
    "Last-Event-ID": {"type": "string"},
    "Prefer": {"type": "string"},
}

_REQUEST_ID: Final = {"X-Request-ID": "The request's id, as in the log"}
_RETRY: Final = {"Retry-After": "Seconds to wait before trying again"}
_PROBLEM_HEADERS: Final[dict[int, dict[str, str]]] = {
    401: {"WWW-Authenticate": "The kind of token that is needed"},
    429: _RETRY,
    503: _RETRY,
}

_ASSETS: Final = {
    "swagger-ui.css": ("text/css", "static"),
    "swagger-ui-bundle.js": ("text/javascript", "static"),
}

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Headrace: HTTP API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""

_START: Final = """SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null});
"""

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'"
)


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    found = [
        (path, method, operation, parameters)
        for path, resource, parameters in routes
        for method in METHODS
        if (operation := operation_of(resource, method)) is not None
    ]
    schemas, names = _schemas([operation for _, _, operation, _ in found])
    paths: dict[str, Any] = {}
    for path, method, operation, parameters in found:
        place = re.sub(r"\{(\w+)(?::\w+)?\}", lambda match: "{" + _camel(match.group(1)) + "}", path)
        paths.setdefault(place, {})[method] = _operation(operation, method, place, parameters, names)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": _version(),
            "summary": "Turns huge line-oriented files in S3 into MongoDB documents",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(operations: Sequence[Operation]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The schemas of all types by name, and the schema that refers to each type, by `id()` of the type."""
    types: list[tuple[int, Any, Any]] = []
    for each in operations:
        for body, mode in [(each.body, "validation"), *((a.body, "serialization") for a in each.answers.values())]:
            if body is not None and all(id(body) != key for key, _, _ in types):
                types.append((id(body), mode, body))
    types.append((id(ProblemBody), "serialization", ProblemBody))
    refs, whole = TypeAdapter.json_schemas(
        [(key, mode, TypeAdapter(body)) for key, mode, body in types], ref_template=_REFS
    )
    return whole.get("$defs", {}), {int(key): schema for (key, _), schema in refs.items()}


def _operation(
    operation: Operation, method: str, path: str, parameters: Mapping[str, str], names: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": method + "".join(part.title() for part in re.findall(r"\w+", path)),
        "summary": operation.summary,
        "tags": [operation.group],
        "responses": {str(status): _answer(answer, names) for status, answer in operation.answers.items()},
    }
    problems = {*operation.errors, 400, 431, 500}
    if operation.body is not None:
        problems |= {413, 415}
        problems |= {422} if operation.body_media == "application/json" else set()
        content = {operation.body_media: {"schema": names[id(operation.body)]}}
        made["requestBody"] = {"content": content, "required": not _takes_nothing(operation.body)}
    if operation.scope is not None:
        problems |= {401, 403, 422, 503}
        problems |= {413, 415}  # for a body that the call does not take
        made["security"] = [{"bearer": [operation.scope.value]}, {}]
        made["description"] = f"Needs the scope `{operation.scope.value}` if the API has tokens."
    problem = {"application/problem+json": {"schema": names[id(ProblemBody)]}}
    for status in sorted(problems - set(operation.answers)):
        headers = _headers(_PROBLEM_HEADERS.get(status, {}))
        made["responses"][str(status)] = {"description": _PROBLEMS[status], "headers": headers, "content": problem}
    given = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": what,
            "schema": {"type": "string", "minLength": 1},
        }
        for name, what in parameters.items()
        if "{" + name + "}" in path
    ]
    given += [
        {"name": name, "in": "header", "required": False, "description": what, "schema": _HEADERS[name]}
        for name, what in operation.headers.items()
    ]
    if operation.query is not None:
        schema = operation.query.model_json_schema()
        given += [
            {"name": name, "in": "query", "required": False, "schema": _plain(field)}
            for name, field in schema["properties"].items()
        ]
    if given:
        made["parameters"] = given
    return made


def _takes_nothing(body: Any) -> bool:
    """Whether `{}` is a valid body, so that the body may be left out."""
    try:
        TypeAdapter(body).validate_python({})
    except ValidationError:
        return False
    return True


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a query parameter, without null: an optional parameter is left out instead."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) == 1:
        schema = {k: v for k, v in schema.items() if k not in ("anyOf", "default")} | kinds[0]
    return {name: value for name, value in schema.items() if name != "title"}


def _answer(answer: Answer, names: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {"description": answer.what, "headers": _headers(answer.headers)}
    if answer.body is not None:
        made["content"] = {answer.media: {"schema": names[id(answer.body)]}}
        if answer.other_media is not None:
            made["content"][answer.other_media] = {"schema": {"type": "string", "format": "binary"}}
    return made


def _headers(own: Mapping[str, str]) -> dict[str, Any]:
    """The headers of an answer: its own, and X-Request-ID, which all answers have."""
    headers = {**_REQUEST_ID, **own}
    return {name: {"description": what, "schema": {"type": "string"}} for name, what in headers.items()}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "0"


class OpenApi:
    """GET /openapi.json."""

    def __init__(self) -> None:
        self._body = b"{}"

    def describe(self, routes: Sequence[Route]) -> None:
        """Build the document; called once, when all routes are known."""
        self._body = orjson.dumps(document(routes))

    @operation(
        summary="This description", group="docs", scope=None, answers={200: Answer("OpenAPI 3.1", dict[str, Any])}
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 with the document."""
        resp.content_type = "application/json"
        resp.data = self._body


class Docs:
    """GET /docs and the files of its page."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, asset: str = "") -> None:
        """200 with the page, or one of its files."""
        resp.set_header("Content-Security-Policy", _POLICY)
        if not asset:
            resp.content_type = "text/html; charset=utf-8"
            resp.text = _PAGE
        elif asset == "start.js":
            resp.content_type = "text/javascript; charset=utf-8"
            resp.text = _START
        elif asset in _ASSETS:
            kind, folder = _ASSETS[asset]
            resp.content_type = f"{kind}; charset=utf-8"
            resp.cache_control = ["max-age=86400"]
            resp.data = (importlib.resources.files("swagger_ui") / folder / asset).read_bytes()
        else:
            raise Problem(404, "not_found", f"the documentation has no file {asset[:100]!r}")
