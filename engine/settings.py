"""Every setting, from the environment and `.env`, checked against each other at the start.

The environment wins over `.env`; an empty value counts as unset. No other module reads settings from the environment.
"""

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import quote, quote_plus, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri

from engine.cores import cores
from engine.errors import SettingsError

__all__ = ["DEFAULT_DATABASE", "Settings", "http_url", "load"]

DEFAULT_DATABASE: Final = "headrace"

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

_UNITS: Final = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)
}
_REGION: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_BUCKET: Final = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:\S{1,2000}")
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(ib|b)?\s*", re.IGNORECASE)


def _size(value: object) -> object:
    """64MiB, 1.5GB, 4096 → bytes."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError("write a size such as 4096, 512KiB or 1.5GB")
    number, letter, suffix = match.group(1), match.group(2).lower(), (match.group(3) or "").lower()
    if len(number) > 20:
        raise ValueError("no size is as large as that")
    return int(Decimal(number) * _UNITS[letter + "ib" if suffix == "ib" and letter else letter])


Bytes = Annotated[int, BeforeValidator(_size)]


# What the driver says of a URI without a word of its values, any of which may be a secret.
_HARMLESS: Final = re.compile(
    r"Unknown option: \w+|The value of \w+ must be (an integer|'true' or 'false')|Port must be .+"
)


def _mongo_uri(value: SecretStr | None) -> SecretStr | None:
    """A URI that can be read and names a database, or none. No message holds it: it may hold a password."""
    if value is None:
        return value
    try:
        parsed = _parsed(value.get_secret_value())
    except OSError as error:  # of a certificate
        raise ValueError(
            f"the file {error.filename} that it names cannot be read ({error.strerror}): name one that can"
        ) from None
    except (PyMongoError, ValueError) as error:
        harmless = _HARMLESS.match(str(error))
        why = harmless.group() if harmless else type(error).__name__
        raise ValueError(
            f"it cannot be read ({why}): write mongodb://host:port/database, with user and password as the "
            "README shows, and special characters of a password percent-encoded"
        ) from None
    if parsed["collection"] is not None or (fault := _database_fault(parsed["database"] or DEFAULT_DATABASE)):
        fault = "it has a dot" if parsed["collection"] is not None else fault
        raise ValueError(f"the database that it names cannot be used: {fault}")
    return value


def _parsed(uri: str) -> Mapping[str, Any]:
    """What the driver reads in a URI; one of +srv is read without asking the DNS for its hosts."""
    prefix = "mongodb+srv://"
    return parse_uri("mongodb://" + uri[len(prefix) :] if uri.startswith(prefix) else uri, warn=False)


def _database_fault(name: str) -> str | None:
    """Why MongoDB takes no database of this name; None where it does."""
    if len(name.encode()) > 63:
        return "its name has more than 63 bytes"
    if name.lower() in ("admin", "config", "local"):
        return f"{name} is MongoDB's own (to say where a user is defined, write authSource={name}): name another"
    wrong = sorted(set(name) & set('/\\. "$*<>:|?\0'))
    return f"its name has {wrong[0]!r} in it" if wrong else None


def _control_db(value: str) -> str:
    if fault := _database_fault(value):
        raise ValueError(f"it cannot be the name of a database: {fault}")
    return value


def _like(pattern: re.Pattern[str], sentence: str) -> AfterValidator:
    """A value, where there is one, that the whole of a pattern matches."""

    def check(value: str | None) -> str | None:
        if value is not None and not pattern.fullmatch(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def http_url(value: str | None) -> str | None:
    """A URL of a server that speaks HTTP, or none. Raises ValueError, with how to write one, for anything else."""
    if value is not None:
        try:
            parts = urlsplit(value)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            right = False
        if not right or re.search(r"\s", value):
            raise ValueError("write it as http://host:port or https://host:port")
    return value


def _visible(advice: str) -> AfterValidator:
    """What goes into a header of HTTP, where there is any. No message holds it: it may be a secret."""

    def check(value: Any) -> Any:
        plain = value.get_secret_value() if isinstance(value, SecretStr) else value
        if plain is not None and not re.fullmatch(r"[!-~]+", plain):
            raise ValueError(f"it has spaces, line ends or letters beyond ASCII: {advice}")
        return value

    return AfterValidator(check)


_PAIR: Final = ("aws_access_key_id", "aws_secret_access_key")
_KEY: Final = _visible("copy the key alone, with nothing around it")


def _writers(found: dict[str, Any]) -> int:
    """Enough writes under way to bridge the database's waits for its journal, and no more than 128 of one engine. With more of
    them mongod takes more CPU for the same documents."""
    return max(2, min(4, 128 // int(found["engine_workers"])))


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _setting(default: Any, description: str, unit: str = "", in_words: str = "", **limits: Any) -> Any:
    """A setting; `in_words` is the default in words where it is worked out."""
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
    mongo_uri: Annotated[SecretStr | None, AfterValidator(_mongo_uri)] = _setting(
        None, "MongoDB that holds the queue and the documents; the documents go to the database it names"
    )
    aws_region: Annotated[str, _like(_REGION, "write a region such as eu-central-1")] = _setting(
        "us-east-1", "Region of the bucket"
    )
    aws_access_key_id: Annotated[str | None, _KEY] = _setting(None, "S3 access key")
    aws_secret_access_key: Annotated[SecretStr | None, _KEY] = _setting(None, "S3 secret key")
    aws_session_token: Annotated[SecretStr | None, _KEY] = _setting(None, "S3 session token, for temporary keys")
    aws_bucket_name: Annotated[str | None, _like(_BUCKET, "write the name of a bucket, or its ARN")] = _setting(
        None, "Bucket that holds the files"
    )
    aws_endpoint_url: Annotated[str | None, AfterValidator(http_url)] = _setting(
        None, "URL of an S3 server other than AWS"
    )

    engine_workers: int = _setting(
        cores, "Worker processes", "processes", "the number of cores, or the container's CPU limit", ge=1, le=1024
    )
    engine_control_db: Annotated[str, AfterValidator(_control_db)] = _setting(
        "headrace_control", "Database of the jobs, ranges and rejects", min_length=1
    )
    engine_range_bytes: Bytes = _setting(64 * MIB, "Maximum size of one range of an object", "bytes", ge=64 * KIB)
    engine_read_bytes: Bytes = _setting(MIB, "How much is read from S3 at a time", "bytes", ge=4 * KIB, le=64 * MIB)
    engine_max_line_bytes: Bytes = _setting(32 * MIB, "A longer line is rejected", "bytes", ge=1 * KIB, le=256 * MIB)
    engine_batch_records: int = _setting(1000, "Maximum lines in one bulk write", "records", ge=1, le=20_000)
    engine_batch_bytes: Bytes = _setting(
        2 * MIB, "Maximum bytes of lines in one bulk write; a longer one goes alone", "bytes", ge=64 * KIB, le=4 * MIB
    )
    engine_writers: int = _setting(
        _writers, "Concurrent bulk writes of one worker", "writes", "4; fewer with over 32 workers", ge=1, le=64
    )
    engine_lease_seconds: float = _setting(30.0, "How long a lease lasts without renewal", "seconds", ge=1, le=3600)
    engine_watchdog_seconds: float = _setting(
        60.0, "A worker silent for this long is replaced", "seconds", ge=1, le=86_400
    )
    engine_grace_seconds: float = _setting(20.0, "How long a graceful stop may take", "seconds", ge=0, le=3600)
    engine_poll_seconds: float = _setting(
        2.0, "Poll interval of idle workers, if no wake-up comes first", "seconds", ge=0.05, le=4
    )
    engine_keep_jobs_days: float = _setting(
        30.0, "How long ended jobs and their rejects are kept", "days", gt=0, le=36_500
    )
    engine_data_dir: Path = _setting(Path(".headrace"), "Data and logs of the embedded servers", "folder")
    engine_log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = _setting(
        "info", "Least level that is logged"
    )
    engine_log_format: Literal["auto", "text", "json"] = _setting("auto", "auto: text on a terminal, JSON elsewhere")

    api_host: str = _setting("127.0.0.1", "Address that the HTTP API listens on")
    api_threads: int = _setting(32, "Requests that the HTTP API handles at a time", "threads", ge=4, le=256)
    api_tokens: SecretStr | None = _setting(
        None, "Token entries that the HTTP API accepts, as `headrace token` prints them, separated by spaces or commas"
    )
    api_tokens_file: Path | None = _setting(None, "A file of such entries, one per line", "file")
    api_token: Annotated[SecretStr | None, _visible("copy it as `headrace token` showed it")] = _setting(
        None, "Token that the command line sends to the HTTP API"
    )
    api_url: Annotated[str | None, AfterValidator(http_url)] = _setting(
        None, "HTTP API that the command line talks to; unset: API_HOST and PORT", "URL"
    )
    api_max_uploads: int = _setting(4, "Uploads through POST /upload at a time", "uploads", ge=1, le=128)
    api_max_watchers: int = _setting(8, "Requests that wait for a job to change, at a time", "requests", ge=0, le=128)
    api_max_downloads: int = _setting(4, "Downloads of rejected lines at a time", "requests", ge=1, le=128)
    api_max_open_jobs: int = _setting(100_000, "Maximum open jobs; more are refused", "jobs", ge=1, le=10_000_000)
    api_max_upload_bytes: Bytes = _setting(
        10 * GIB,
        "The largest body that POST /upload takes; above 78 GiB, parts are larger, and so is the memory they take",
        "bytes",
        ge=1,
        le=5 * TIB,
    )
    api_part_bytes: Bytes = _setting(8 * MIB, "Part size of an upload to S3", "bytes", ge=5 * MIB, le=256 * MIB)
    api_upload_parallel: int = _setting(6, "Parts sent to S3 at a time, over all uploads", "parts", ge=1, le=64)
    api_spool_dir: Path | None = _setting(
        None, "Where bodies are spooled; unset: the system's temporary folder", "folder"
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
        """Settings that are right alone and wrong together."""
        wrong: list[str] = []
        if self.data_db().lower() == self.engine_control_db.lower():  # MongoDB takes no two that differ by case
            wrong.append(
                f"ENGINE_CONTROL_DB={self.engine_control_db}: it is the database that MONGO_URI names for the documents, or "
                f"{DEFAULT_DATABASE} where it names none; name another"
            )
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            wrong.append("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: set both or neither")
        if self.api_max_uploads + self.api_max_watchers + self.api_max_downloads >= self.api_threads:
            wrong.append(
                f"API_THREADS={self.api_threads}: it must be more than API_MAX_UPLOADS={self.api_max_uploads}, "
                f"API_MAX_WATCHERS={self.api_max_watchers} and API_MAX_DOWNLOADS={self.api_max_downloads} together, so that a "
                "thread is left for everything else"
            )
        if self.engine_watchdog_seconds <= self.answer_seconds:
            wrong.append(
                f"ENGINE_WATCHDOG_SECONDS={self.engine_watchdog_seconds:g}: it must be more than {self.answer_seconds:g} "
                f"seconds, the longest wait for an answer with ENGINE_LEASE_SECONDS={self.engine_lease_seconds:g}"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def socket_timeout_seconds(self) -> float:
        """How long a worker waits for an answer: less than a lease, so that a lost one is noticed by its holder first."""
        return self.engine_lease_seconds * 0.8

    @property
    def select_timeout_seconds(self) -> float:
        """How long a command waits for a primary, or a request for a connection, before it is given up, to be tried again."""
        return min(5.0, self.engine_lease_seconds / 4)

    @property
    def answer_seconds(self) -> float:
        """The longest wait for a server in which nothing moves."""
        return self.select_timeout_seconds + self.socket_timeout_seconds

    @property
    def write_timeout_seconds(self) -> float:
        """How long the server waits for a majority: less than the socket does, so that it is the server who says so."""
        return self.engine_lease_seconds * 0.6

    def data_db(self) -> str:
        """The database that takes the documents."""
        if self.mongo_uri is None:
            return DEFAULT_DATABASE
        return str(_parsed(self.mongo_uri.get_secret_value())["database"] or DEFAULT_DATABASE)

    def secrets(self) -> list[str]:
        """Every value that must never be shown."""
        values = [self.aws_secret_access_key, self.aws_session_token, self.mongo_uri, self.api_token, self.api_tokens]
        found = [value.get_secret_value() for value in values if value is not None]
        if self.mongo_uri is not None and (password := _parsed(self.mongo_uri.get_secret_value())["password"]):
            found += [password, quote_plus(password), quote(password)]
        return found


def load(**overrides: Any) -> tuple[Settings, list[str]]:
    """The settings of this process, and a warning for each name that looks like a setting and is none.

    Args:
        overrides: values that win over the environment, by field.

    Raises:
        SettingsError: lists everything that is wrong.
    """
    try:
        _check_dotenv()
        settings = Settings(**overrides)
    except ValidationError as error:
        wrong = _sentences(error)
        # What the others contradict is told as well: as if those that are wrong by themselves were not set.
        alone = {str(fault["loc"][0]) for fault in error.errors(include_url=False) if fault["loc"]}
        unset = {name: field.default for name, field in Settings.model_fields.items() if name in alone}
        unset |= {"engine_workers": 1} if "engine_workers" in alone else {}
        unset |= {"engine_writers": 1} if {"engine_workers", "engine_writers"} & alone else {}
        unset |= dict.fromkeys(_PAIR) if not alone.isdisjoint(_PAIR) else {}
        try:
            Settings(**overrides | unset)
        except ValidationError as more:
            wrong += [sentence for sentence in _sentences(more) if sentence not in wrong]
        raise SettingsError("\n".join(wrong)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read: {error}") from None
    return settings, _unknown()


def _sentences(error: ValidationError) -> list[str]:
    sentences: list[str] = []
    for fault in error.errors(include_url=False):
        if fault["type"] == "default_factory_not_called":
            continue  # it depends on a setting that is wrong itself
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:
            sentences += message.split("\n")
            continue
        field = str(fault["loc"][0])
        annotation = Settings.model_fields[field].annotation if field in Settings.model_fields else None
        given = str(fault["input"])[:100]
        # The other key may have been pasted into the one that is none.
        shown = (
            ""
            if "SecretStr" in str(annotation) or field in _PAIR
            else f"={given if given.isprintable() else repr(given)}"
        )
        sentences.append(f"{field.upper()}{shown}: {message[0].lower()}{message[1:]}")
    return sentences


OURS: Final = ("ENGINE_", "API_")
"""How the names of settings begin that no other program has."""


def _unknown() -> list[str]:
    known = [name.upper() for name in Settings.model_fields]
    in_file = set(_dotenv())
    names = set(os.environ) | in_file
    warnings: list[str] = []
    for name in sorted(names):
        upper = name.upper()
        if upper in known:
            continue
        # Of other programs there are many in the environment, and a few in this file.
        near = difflib.get_close_matches(upper, known, n=1, cutoff=0.6 if upper.startswith(OURS) else 0.75)
        if upper.startswith(OURS) or (near and (name in in_file or upper.startswith("MONGO"))):
            warnings.append(f"{name} is not a setting of Headrace" + (f": did you mean {near[0]}?" if near else ""))
    return warnings


def _check_dotenv() -> None:
    """Raises SettingsError for a line of .env that cannot be read, of which the library says a word and goes on without it."""
    from dotenv.parser import parse_stream

    with suppress(FileNotFoundError), Path(".env").open(encoding="utf-8") as file:
        lines = [str(binding.original.line) for binding in parse_stream(file) if binding.error]
        if lines:
            raise SettingsError(
                f".env, line {', '.join(lines)}: it cannot be read: write NAME=value, with a quote at both ends or at none"
            )


def _dotenv() -> Mapping[str, object]:
    from dotenv import dotenv_values  # only here: the rest is read through pydantic-settings

    return dotenv_values(".env")
