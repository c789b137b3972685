"""Reading S3's answers, and errors for answers that cannot be S3's: not everything that speaks HTTP is S3."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from botocore.parsers import ResponseParserError

from engine.errors import Transient

__all__ = ["LOOK", "field", "reply_translated"]

_HEADERS: Final = {"ContentLength": "Content-Length"}
"""HTTP names of the headers that boto3 names differently."""

LOOK: Final = "check the S3 server, and that AWS_ENDPOINT_URL points to it"
"""Advice for an answer that S3 would not give."""


@contextmanager
def reply_translated(of: str) -> Iterator[None]:
    """Raises Transient for an answer of S3 that the client cannot parse; `of` says what the answer is about."""
    try:
        yield
    except (ValueError, ResponseParserError) as error:
        why = str(error).partition("\n")[0].rstrip(":")  # the rest is the whole answer
        raise Transient(f"S3's answer for {of} cannot be read ({why}): {LOOK}") from error


def field(answer: Any, name: str, of: str) -> Any:
    """The value of `name` in an answer or in a part of one; `of` says what the answer is about.

    Raises:
        Transient: it is missing, empty or negative.
    """
    value, header = answer.get(name), _HEADERS.get(name, name)
    if value is None or value == "":
        raise Transient(f"S3's answer for {of} lacks {header}: {LOOK}")
    if isinstance(value, int) and value < 0:
        raise Transient(f"S3's answer for {of} has {header} {value}: {LOOK}")
    return value
