"""Models of the bodies and queries of requests, which validate them and describe them in OpenAPI."""

import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

from engine.model import Format, JobOptions
from engine.s3.direct import MAX_URLS
from engine.s3.parts import MAX_PARTS
from engine.values import matching

__all__ = [
    "BatchRequest",
    "FileForm",
    "FilesQuery",
    "JobsQuery",
    "PartsQuery",
    "ProcessRequest",
    "RejectsQuery",
    "UploadBegin",
]

PAGE: Final = 100
"""Default size of a page."""

MAX_PAGE_SIZE: Final = 1000
MAX_KEYS: Final = 1000
ID: Final = r"^[0-9a-fA-F]{24}$"

_MAX_COUNT: Final = 2**53 - 1
_PERCENTAGE: Final = r"^(100(\.0{1,6})?|[0-9]{1,2}(\.[0-9]{1,6})?)%$"
_MOMENT: Final = (
    r"^2[0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)
"""RFC 3339, in the years 2000 to 2999."""


def _whole(value: object) -> object:
    """JSON has one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Priority = Annotated[int, Field(strict=True, ge=-1000, le=1000), BeforeValidator(_whole)]
_Seconds = Annotated[int, Field(strict=True, ge=1, le=31_536_000), BeforeValidator(_whole)]
_Size = Annotated[int, Field(strict=True, ge=0, le=5 * 1024**4), BeforeValidator(_whole)]
_PartSize = Annotated[int, Field(strict=True, ge=5 * 1024**2, le=5 * 1024**3), BeforeValidator(_whole)]


def _budget(value: object) -> object:
    """A count, or a percentage such as "2%"."""
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('write a count such as 1000, or a percentage such as "2%"')
    if isinstance(value, int):
        if not 0 <= value <= _MAX_COUNT:
            raise ValueError("a count must be at least 0 and below 2^53")
        return value
    if not re.fullmatch(_PERCENTAGE, value):
        raise ValueError(
            'write a count such as 1000, or a percentage up to "100%" with at most six decimals, such as "0.5%"'
        )
    return value


def _moment(value: object) -> object:
    """A time with its offset from UTC, as in 2026-11-24T09:00:00Z."""
    if value is None or isinstance(value, datetime):
        return value
    wrong = "write an RFC 3339 time in the years 2000 to 2999 with its offset from UTC, such as 2026-11-24T09:00:00Z"
    if not isinstance(value, str) or not re.fullmatch(_MOMENT, value):
        raise ValueError(wrong)
    try:
        return datetime.fromisoformat(value.upper())
    except ValueError:
        raise ValueError(f"there is no such time: {wrong}") from None


_BUDGET_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": _MAX_COUNT},
        {"type": "string", "pattern": _PERCENTAGE},
    ]
}
_MOMENT_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string", "format": "date-time", "pattern": _MOMENT},
        {"type": "null"},
    ]
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, strict=True)


class ProcessRequest(_Request):
    """How an object is to be loaded; every field may be left out."""

    collection: Annotated[str, Field(min_length=1, max_length=200, description="Where the documents go")] = "records"
    format: Annotated[Literal["auto", "ndjson", "text"], Field(description="How a line becomes a document")] = "auto"
    max_errors: Annotated[
        int | str,
        BeforeValidator(_budget),
        Field(
            description="Rejects allowed: a count, or a percentage of the lines, which is judged from 10,000 lines on "
            "and at the end",
            json_schema_extra=_BUDGET_SCHEMA,
        ),
    ] = 1000
    priority: Annotated[_Priority, Field(description="Higher goes first")] = 0
    force: Annotated[StrictBool, Field(description="Load a second copy, with ids of its own")] = False
    if_loaded: Annotated[
        Literal["load", "skip"],
        Field(description="skip: complete at once if this is already loaded; a dry run is never skipped"),
    ] = "load"
    # Not named `validate`, which is a deprecated method of pydantic models.
    dry_run: Annotated[
        StrictBool, Field(alias="validate", description="Dry run: check everything, write no document")
    ] = False
    run_at: Annotated[
        datetime | None,
        BeforeValidator(_moment),
        Field(description="Start no earlier than this", json_schema_extra=_MOMENT_SCHEMA),
    ] = None
    timeout_seconds: Annotated[_Seconds | None, Field(description="Fail if it runs longer")] = None

    def options(self) -> JobOptions:
        """The options as the engine takes them."""
        return JobOptions(
            collection=self.collection,
            format=Format(self.format),
            max_errors=self.max_errors,
            priority=self.priority,
            force=self.force,
            if_loaded=self.if_loaded,
            validate=self.dry_run,
            timeout_seconds=self.timeout_seconds,
            run_at=self.run_at,
        )


class BatchRequest(ProcessRequest):
    """Many objects in one call: those whose keys begin with `prefix`, or those in `fileKeys`; and how to load each."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"type": kind}, other: {"type": "null"}}}
                for name, kind, other in (("prefix", "string", "fileKeys"), ("fileKeys", "array", "prefix"))
            ]
        }
    )

    prefix: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    file_keys: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]] | None, Field(min_length=1, max_length=MAX_KEYS)
    ] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "BatchRequest":
        if (self.prefix is None) == (self.file_keys is None):
            raise ValueError("give either prefix or fileKeys")
        return self


class UploadBegin(_Request):
    """A file whose parts the client will send to S3 itself."""

    file_name: Annotated[str, Field(min_length=1, max_length=1024)]
    size: Annotated[_Size | None, Field(description="Bytes, if known")] = None
    part_bytes: _PartSize | None = None


class FileForm(BaseModel):
    """A form with one file."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)


Limit = Annotated[int, Field(ge=1, le=MAX_PAGE_SIZE, description="Maximum to return")]


_NEXT: Final = "`next` of the previous page"
_CURSOR: Final = f"a cursor is {_NEXT}: leave it out for the first page"
_OFFSET: Final = r"^[0-9]{1,18}$"

_BatchId = Annotated[
    str,
    matching(re.compile(ID), "the id of a batch has 24 hexadecimal digits"),
    WithJsonSchema({"type": "string", "pattern": ID}),
]
_JobsCursor = Annotated[str, matching(re.compile(ID), _CURSOR), WithJsonSchema({"type": "string", "pattern": ID})]
_RejectsCursor = Annotated[
    str, matching(re.compile(_OFFSET), _CURSOR), WithJsonSchema({"type": "string", "pattern": _OFFSET})
]


class JobsQuery(_Query):
    """Which jobs to return."""

    status: Literal["PENDING", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED"] | None = None
    file: Annotated[str | None, Field(min_length=1, max_length=1024, description="Only jobs of this key")] = None
    collection: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    batch: _BatchId | None = None
    limit: Limit = PAGE
    cursor: Annotated[_JobsCursor | None, Field(description=_NEXT)] = None


class RejectsQuery(_Query):
    """Which rejects to return, and in which format."""

    format: Literal["json", "ndjson"] = "json"
    limit: Limit = PAGE
    cursor: Annotated[_RejectsCursor | None, Field(description=_NEXT)] = None


class FilesQuery(_Query):
    """Which files to return."""

    prefix: Annotated[str, Field(max_length=1024)] = ""
    limit: Limit = PAGE
    cursor: Annotated[str | None, Field(min_length=1, max_length=2048, description=_NEXT)] = None


class PartsQuery(_Query):
    """Which signed URLs to return."""

    first: Annotated[int, Field(ge=1, le=MAX_PARTS, description="Number of the first part")] = 1
    count: Annotated[int, Field(ge=0, le=MAX_URLS)] = PAGE
