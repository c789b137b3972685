"""Every setting, from the environment and `.env`, checked against the others at the start.

The environment wins over `.env`; an empty value counts as unset. No other module reads settings from the environment.
"""

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import quote, quote_plus

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine.errors import SettingsError
from engine.machine import cores
from engine.values import (
    BUCKET,
    DEFAULT_DATABASE,
    GIB,
    KIB,
    MIB,
    REGION,
    TIB,
    Bytes,
    database_name,
    header_safe,
    http_url,
    lower,
    matching,
    mongo_uri_of,
    parsed_uri,
)

__all__ = ["LOOP_SECONDS", "Settings", "load"]

LOOP_SECONDS: Final = 0.5
"""Maximum interval between the supervisor's checks of its workers. A worker that would exceed the watchdog's limit
before the next check is killed at this one."""

_PAIR: Final = ("aws_access_key_id", "aws_secret_access_key")
_KEY: Final = header_safe("copy the key alone, with nothing around it")


def _writers(found: dict[str, Any]) -> int:
    """Enough writes in flight to keep the database busy while it waits for its journal, but at most 128 for one engine
    (twice as many if the database is far away): with more, mongod spends more CPU on the same documents."""
    return max(2, min(4, 128 // int(found["engine_workers"])))


def _setting(default: Any, description: str, unit: str = "", in_words: str = "", **limits: Any) -> Any:
    """A setting; `in_words` describes the default if it is computed."""
    extra: dict[str, Any] = {"unit": unit}
    if callable(default):
        extra["in_words"] = in_words
        return Field(default_factory=default, description=description, json_schema_extra=extra, **limits)
    return Field(default=default, description=description, json_schema_extra=extra, **limits)


class Settings(BaseSettings):
    """The settings, each named as in the environment but in lower case. Sizes are bytes, times are seconds."""

    model_config = SettingsConfigDict(
        frozen=True, env_file=".env", extra="ignore", env_ignore_empty=True, allow_inf_nan=False
    )

    port: int = _setting(3000, "Port of the HTTP API", "port", ge=1, le=65535)
    mongo_uri: Annotated[SecretStr | None, AfterValidator(mongo_uri_of)] = _setting(
        None, "MongoDB for the queue and the documents; the documents go to the database that it names"
    )
    aws_region: Annotated[str, matching(REGION, "write a region such as eu-central-1")] = _setting(
        "us-east-1", "Region of the bucket"
    )
    aws_access_key_id: Annotated[str | None, _KEY] = _setting(None, "S3 access key")
    aws_secret_access_key: Annotated[SecretStr | None, _KEY] = _setting(None, "S3 secret key")
    aws_session_token: Annotated[SecretStr | None, _KEY] = _setting(None, "S3 session token, for temporary keys")
    aws_bucket_name: Annotated[str | None, matching(BUCKET, "write the name of a bucket, or its ARN")] = _setting(
        None, "Bucket that holds the files"
    )
    aws_endpoint_url: Annotated[str | None, AfterValidator(http_url)] = _setting(
        None, "URL of an S3 server other than AWS"
    )

    engine_workers: int = _setting(
        cores, "Worker processes", "processes", "the number of cores, or the container's CPU limit", ge=1, le=1024
    )
    engine_control_db: Annotated[str, AfterValidator(database_name)] = _setting(
        "headrace_control", "Database of the jobs, ranges and rejects", min_length=1
    )
    engine_range_bytes: Bytes = _setting(
        64 * MIB,
        "Maximum size of one range of an object; ranges are larger where an object would have over 100,000 of them, and "
        "smaller where it would have under 4 for each worker",
        "bytes",
        ge=64 * KIB,
    )
    engine_read_bytes: Bytes = _setting(MIB, "How much is read from S3 at a time", "bytes", ge=4 * KIB, le=64 * MIB)
    engine_max_line_bytes: Bytes = _setting(32 * MIB, "A longer line is rejected", "bytes", ge=1 * KIB, le=256 * MIB)
    engine_batch_records: int = _setting(1000, "Maximum lines in one bulk write", "records", ge=1, le=20_000)
    engine_batch_bytes: Bytes = _setting(
        2 * MIB, "Maximum bytes of lines in one bulk write; a longer line goes alone", "bytes", ge=64 * KIB, le=4 * MIB
    )
    engine_writers: int = _setting(
        _writers,
        "Concurrent bulk writes of one worker; up to twice as many where MongoDB is far away",
        "writes",
        "4; fewer with over 32 workers",
        ge=1,
        le=64,
    )
    engine_lease_seconds: float = _setting(30.0, "How long a lease lasts without renewal", "seconds", ge=1, le=3600)
    engine_watchdog_seconds: float = _setting(
        60.0, "A worker that is silent for this long is replaced", "seconds", ge=1, le=86_400
    )
    engine_grace_seconds: float = _setting(20.0, "How long a graceful stop may take", "seconds", ge=0, le=3600)
    engine_poll_seconds: float = _setting(
        2.0, "Poll interval of idle workers, if no wake-up comes first", "seconds", ge=0.05, le=4
    )
    engine_keep_jobs_days: float = _setting(
        30.0, "How long ended jobs and their rejects are kept", "days", gt=0, le=36_500
    )
    engine_data_dir: Path = _setting(Path(".headrace"), "Data and logs of the embedded servers", "folder")
    engine_log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower)] = _setting(
        "info", "Lowest level that is logged"
    )
    engine_log_format: Literal["auto", "text", "json"] = _setting("auto", "auto: text on a terminal, JSON elsewhere")

    api_host: Annotated[
        str, AfterValidator(str.strip), matching(re.compile(r"\S+"), "write an address such as 127.0.0.1 or 0.0.0.0")
    ] = _setting("127.0.0.1", "Address that the HTTP API listens on")
    api_threads: int = _setting(32, "Requests that the HTTP API handles at the same time", "threads", ge=4, le=256)
    api_tokens: SecretStr | None = _setting(
        None, "Token entries that the HTTP API accepts, as `headrace token` prints them, separated by spaces or commas"
    )
    api_tokens_file: Path | None = _setting(None, "File of token entries, one per line", "file")
    api_token: Annotated[SecretStr | None, header_safe("copy it as `headrace token` showed it")] = _setting(
        None, "Token that the command line sends to the HTTP API"
    )
    api_url: Annotated[str | None, AfterValidator(http_url)] = _setting(
        None, "HTTP API that the command line talks to; if unset, the one at API_HOST and PORT", "URL"
    )
    api_max_uploads: int = _setting(4, "Concurrent uploads through POST /upload", "uploads", ge=1, le=128)
    api_max_watchers: int = _setting(8, "Concurrent requests that wait for a job to change", "requests", ge=0, le=128)
    api_max_downloads: int = _setting(4, "Concurrent downloads of rejected lines", "requests", ge=1, le=128)
    api_max_open_jobs: int = _setting(100_000, "Maximum open jobs; more are refused", "jobs", ge=1, le=10_000_000)
    api_max_upload_bytes: Bytes = _setting(
        10 * GIB,
        "Maximum size of a body that POST /upload takes; above 78 GiB, parts are larger and take more memory",
        "bytes",
        ge=1,
        le=5 * TIB,
    )
    api_part_bytes: Bytes = _setting(8 * MIB, "Part size of an upload to S3", "bytes", ge=5 * MIB, le=256 * MIB)
    api_upload_parallel: int = _setting(6, "Concurrent parts sent to S3, over all uploads", "parts", ge=1, le=64)
    api_spool_dir: Path | None = _setting(
        None, "Folder where bodies are spooled; if unset, the system's temporary folder", "folder"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments win over the environment, which wins over `.env`."""
        return init_settings, env_settings, dotenv_settings

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Raises ValueError, with a line for each contradiction between settings that are valid alone."""
        wrong: list[str] = []
        if self.data_db().lower() == self.engine_control_db.lower():  # MongoDB rejects names that differ only in case
            wrong.append(
                f"ENGINE_CONTROL_DB={self.engine_control_db}: it is the database that MONGO_URI names for the documents, or "
                f"{DEFAULT_DATABASE} if it names none; use another"
            )
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            wrong.append("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: set both or neither")
        if self.api_max_uploads + self.api_max_watchers + self.api_max_downloads >= self.api_threads:
            wrong.append(
                f"API_THREADS={self.api_threads}: it must be more than API_MAX_UPLOADS={self.api_max_uploads}, "
                f"API_MAX_WATCHERS={self.api_max_watchers} and API_MAX_DOWNLOADS={self.api_max_downloads} together, so that a "
                "thread is left for everything else"
            )
        if self.engine_watchdog_seconds <= (least := self.answer_seconds + LOOP_SECONDS):
            wrong.append(
                f"ENGINE_WATCHDOG_SECONDS={self.engine_watchdog_seconds:g}: it must be more than {least:g} "
                f"seconds, the longest wait for an answer with ENGINE_LEASE_SECONDS={self.engine_lease_seconds:g}"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def socket_timeout_seconds(self) -> float:
        """How long a worker waits for an answer: less than a lease, so that it notices a lost one before others do."""
        return self.engine_lease_seconds * 0.8

    @property
    def select_timeout_seconds(self) -> float:
        """How long a command waits for a primary, or a request for a connection, before it fails (and is retried)."""
        return min(5.0, self.engine_lease_seconds / 4)

    @property
    def answer_seconds(self) -> float:
        """The longest that a call waits for a server without any progress."""
        return self.select_timeout_seconds + self.socket_timeout_seconds

    @property
    def write_timeout_seconds(self) -> float:
        """How long the database waits for a majority: less than the socket timeout, so that it reports the failure."""
        return self.engine_lease_seconds * 0.6

    def data_db(self) -> str:
        """Name of the database that the documents go to."""
        if self.mongo_uri is None:
            return DEFAULT_DATABASE
        return str(parsed_uri(self.mongo_uri.get_secret_value())["database"] or DEFAULT_DATABASE)

    def secrets(self) -> list[str]:
        """Every value that must never be logged or printed."""
        values = [self.aws_secret_access_key, self.aws_session_token, self.mongo_uri, self.api_token, self.api_tokens]
        found = [value.get_secret_value() for value in values if value is not None]
        if self.mongo_uri is not None and (password := parsed_uri(self.mongo_uri.get_secret_value())["password"]):
            found += [password, quote_plus(password), quote(password)]
        return found


def load(**overrides: Any) -> tuple[Settings, list[str]]:
    """The settings of this process, and a warning for each name that looks like a setting but is not one.

    Args:
        overrides: values by field, which win over the environment.

    Raises:
        SettingsError: lists everything that is wrong.
    """
    try:
        _check_dotenv()
        settings = Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("\n".join(_all_that_is_wrong(error, overrides))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read: {error}") from None
    return settings, _unknown()


def _all_that_is_wrong(error: ValidationError, overrides: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting that is invalid by itself, and for each contradiction between the others, which are
    validated again with defaults in place of the invalid ones."""
    wrong = _sentences(error)
    alone = {str(fault["loc"][0]) for fault in error.errors(include_url=False) if fault["loc"]}
    unset = {name: field.default for name, field in Settings.model_fields.items() if name in alone}
    # These two have computed defaults, and that of engine_writers is computed from engine_workers.
    unset |= {"engine_workers": 1} if "engine_workers" in alone else {}
    unset |= {"engine_writers": 1} if {"engine_workers", "engine_writers"} & alone else {}
    unset |= dict.fromkeys(_PAIR) if not alone.isdisjoint(_PAIR) else {}
    try:
        Settings(**{**overrides, **unset})
    except ValidationError as more:
        wrong += [sentence for sentence in _sentences(more) if sentence not in wrong]
    return wrong


def _sentences(error: ValidationError) -> list[str]:
    sentences: list[str] = []
    for fault in error.errors(include_url=False):
        if fault["type"] == "default_factory_not_called":
            continue  # its default depends on a setting that is invalid itself
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:
            sentences += message.split("\n")
            continue
        field = str(fault["loc"][0])
        annotation = Settings.model_fields[field].annotation if field in Settings.model_fields else None
        given = str(fault["input"])[:100]
        # The value of neither key is shown: the secret key may have been pasted into the other one.
        shown = (
            ""
            if "SecretStr" in str(annotation) or field in _PAIR
            else f"={given if given.isprintable() else repr(given)}"
        )
        sentences.append(f"{field.upper()}{shown}: {message[0].lower()}{message[1:]}")
    return sentences


OURS: Final = ("ENGINE_", "API_")
"""Prefixes of settings that no other program uses."""


def _unknown() -> list[str]:
    known = [name.upper() for name in Settings.model_fields]
    in_file = set(_dotenv())
    names = set(os.environ) | in_file
    warnings: list[str] = []
    for name in sorted(names):
        upper = name.upper()
        if upper in known:
            continue
        # Other programs have many variables in the environment and few in .env: without one of these prefixes only near
        # misses are reported, and from the environment only those that start with MONGO.
        near = difflib.get_close_matches(upper, known, n=1, cutoff=0.6 if upper.startswith(OURS) else 0.75)
        if upper.startswith(OURS) or (near and (name in in_file or upper.startswith("MONGO"))):
            warnings.append(f"{name} is not a setting of Headrace" + (f": did you mean {near[0]}?" if near else ""))
    return warnings


def _check_dotenv() -> None:
    """Raises SettingsError for lines of .env that cannot be parsed: the library would only warn and skip them."""
    from dotenv.parser import parse_stream

    with suppress(FileNotFoundError), Path(".env").open(encoding="utf-8") as file:
        lines = [str(binding.original.line) for binding in parse_stream(file) if binding.error]
        if lines:
            raise SettingsError(
                f".env, line {', '.join(lines)}: it cannot be read: write NAME=value, with quotes at both ends or none"
            )


def _dotenv() -> Mapping[str, object]:
    from dotenv import dotenv_values  # only for the names: values are read through pydantic-settings

    return dotenv_values(".env")
