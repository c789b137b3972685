"""Formats of settings: sizes, URLs, names and keys. Each error says how to write the value."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri

__all__ = [
    "BUCKET",
    "DEFAULT_DATABASE",
    "GIB",
    "KIB",
    "MIB",
    "REGION",
    "TIB",
    "Bytes",
    "database_name",
    "header_safe",
    "http_url",
    "lower",
    "matching",
    "mongo_uri_of",
    "parsed_uri",
]

DEFAULT_DATABASE: Final = "headrace"

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

_UNITS: Final = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)
}
REGION: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
BUCKET: Final = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:\S{1,2000}")
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
        raise ValueError("this size is too large")
    return int(Decimal(number) * _UNITS[letter + "ib" if suffix == "ib" and letter else letter])


Bytes = Annotated[int, BeforeValidator(_size)]


# Messages of the driver that quote no value of the URI: any value may be a secret.
_HARMLESS: Final = re.compile(
    r"Unknown option: \w+|The value of \w+ must be (an integer|'true' or 'false')|Port must be .+"
)


def mongo_uri_of(value: SecretStr | None) -> SecretStr | None:
    """A usable MongoDB URI, or None. Raises ValueError, which never quotes the URI: it may contain a password."""
    if value is None:
        return value
    if re.search(r"\s", value.get_secret_value()):
        raise ValueError(
            "it has a blank or a line end in it, as files of secrets often do: remove it, or write one in a "
            "password as %20"
        )
    try:
        parsed = parsed_uri(value.get_secret_value())
    except OSError as error:  # a certificate file
        raise ValueError(
            f"the file {error.filename} that it names cannot be read ({error.strerror}): name a readable one"
        ) from None
    except (
        PyMongoError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # the last two: options that only Python code can pass
        harmless = _HARMLESS.match(str(error))
        why = harmless.group() if harmless else type(error).__name__
        raise ValueError(
            f"it cannot be read ({why}): write mongodb://host:port/database, with user and password as the "
            "README shows, and special characters in a password percent-encoded"
        ) from None
    dotted = parsed["collection"] is not None
    fault = "its name has a dot" if dotted else _database_fault(parsed["database"] or DEFAULT_DATABASE)
    if fault:
        raise ValueError(f"the database that it names cannot be used: {fault}")
    return value


def parsed_uri(uri: str) -> Mapping[str, Any]:
    """The parts of a URI as the driver parses them; the hosts of a +srv URI are not looked up in the DNS."""
    if uri.startswith("mongodb+srv://"):
        # Without the options that only a +srv URI may have.
        uri = re.sub(r"(?<=[?&])srv\w+=[^&]*&?", "", uri.replace("+srv", "", 1), flags=re.IGNORECASE).rstrip("&")
    return parse_uri(uri, warn=False)


def _database_fault(name: str) -> str | None:
    """Why MongoDB rejects this database name; None if it accepts it."""
    if len(name.encode()) > 63:
        return "its name has more than 63 bytes"
    if name.lower() in ("admin", "config", "local"):
        return f"{name} is MongoDB's own (to say where a user is defined, write authSource={name}): use another"
    wrong = sorted(letter for letter in name if letter in '/\\. "$*<>:|?' or not letter.isprintable())
    return f"its name has {wrong[0]!r} in it" if wrong else None


def database_name(value: str) -> str:
    """The name of a database. Raises ValueError for one that MongoDB rejects."""
    if fault := _database_fault(value):
        raise ValueError(f"it is not a valid database name: {fault}")
    return value


def matching(pattern: re.Pattern[str], sentence: str) -> AfterValidator:
    """Validates that a value, unless it is None, matches the whole pattern; `sentence` is the error message."""

    def check(value: str | None) -> str | None:
        if value is not None and not pattern.fullmatch(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def http_url(value: str | None) -> str | None:
    """The URL of an HTTP server, or None. Raises ValueError for anything else."""
    if value is not None:
        try:
            parts = urlsplit(value)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            right = False
        if not right or re.search(r"\s", value):
            raise ValueError("write it as http://host:port or https://host:port")
    return value


def header_safe(advice: str) -> AfterValidator:
    """Validates that a value, unless it is None, fits into an HTTP header. No error quotes it: it may be a secret."""

    def check(value: Any) -> Any:
        plain = value.get_secret_value() if isinstance(value, SecretStr) else value
        if plain is not None and not re.fullmatch(r"[!-~]+", plain):
            raise ValueError(f"it has spaces, line ends or non-ASCII characters: {advice}")
        return value

    return AfterValidator(check)


def lower(value: object) -> object:
    """A string in lower case; anything else unchanged."""
    return value.lower() if isinstance(value, str) else value
