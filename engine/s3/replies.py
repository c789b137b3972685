"""What S3's answers hold, and what is said of those that hold something else: not all that speaks HTTP is S3."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from botocore.parsers import ResponseParserError

from engine.errors import Transient

__all__ = ["LOOK", "field", "reply_translated"]

_HEADERS: Final = {"ContentLength": "Content-Length"}
"""Headers that boto3 names otherwise."""

LOOK: Final = "check the S3 server, and that AWS_ENDPOINT_URL leads to it"
"""What to do about an answer that S3 would not give."""


@contextmanager
def reply_translated(of: str) -> Iterator[None]:
    """Within it, an answer of S3 that the client cannot read comes out as Transient; `of` says what it is about."""
    try:
        yield
    except (ValueError, ResponseParserError) as error:
        why = str(error).partition("\n")[0].rstrip(":")  # what follows is the whole answer
        raise Transient(f"S3's answer for {of} cannot be read ({why}): {LOOK}") from error


def field(answer: Any, name: str, of: str) -> Any:
    """What an answer, or a part of it, has under `name`; `of` says what it is about.

    Raises:
        Transient: that is nothing, or a negative number.
    """
    value, header = answer.get(name), _HEADERS.get(name, name)
    if value is None or value == "":
        raise Transient(f"S3's answer for {of} lacks {header}: {LOOK}")
    if isinstance(value, int) and value < 0:
        raise Transient(f"S3's answer for {of} has {header} {value}: {LOOK}")
    return value
