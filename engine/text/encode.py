"""Encodes the documents of a piece as BSON in one call, with a small extension in C where that could be compiled. Pure.

Encoding is what costs a worker most, and the extension (`_bson.c`) does it in a quarter of the time that the driver
takes, with the same bytes. It is optional: without it, and for documents that it does not take, the driver encodes.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, Final

__all__ = ["COMPILED", "IDENTITY_BYTES", "Encoded", "Identity", "Object", "encode"]

Object = dict[str, Any]
"""A JSON object, and the document that it becomes."""

IDENTITY_BYTES: Final = 12

_compiled: Callable[[list[Object], bytes, bool], tuple[bytes, list[int]]] | None
try:
    from engine.text import _bson

    _compiled = _bson.encode
except ImportError:  # there was no C compiler, or no header of Python, when Headrace was installed
    _compiled = None

COMPILED: Final = _compiled is not None
"""Whether the extension is there."""


class Identity(tuple[bytes]):
    """A generated `_id`: a tuple that holds its twelve bytes, encoded as an ObjectId without running Python code.

    PyMongo's encoder recognizes types of BSON by their `_type_marker`: 7 is an ObjectId, with its bytes in `binary`.
    """

    __slots__ = ()
    _type_marker = 7
    binary = property(itemgetter(0))


class Encoded(tuple[bytes]):
    """Documents that are BSON already, one after the other: a tuple that holds their bytes.

    PyMongo copies the `raw` bytes of what has the `_type_marker` 101 into the message, where it expects one document.
    Documents of a command simply follow each other there, so these bytes may hold any number of them.
    """

    __slots__ = ()
    _type_marker = 101
    raw = property(itemgetter(0))


def encode(documents: list[Object], identities: bytes, *, checked: bool) -> tuple[Encoded, list[int]] | None:
    """The documents as BSON, `_id` first, and the indexes of those that brought their own `_id`.

    Args:
        documents: parsed by orjson.
        identities: 12 bytes for each, the ObjectId that it gets if it has no `_id`.
        checked: whether no number was an integer that int64 cannot hold. The parser turns one beyond 64 bits into a
            float, so unless they are checked, floats from 2⁶³ on are refused.

    Returns:
        None if the driver has to encode them, since the extension is missing, or for the sake of the driver's error: a
        document cannot become BSON, or they are large; or if the numbers have to be checked.
    """
    if _compiled is None:
        return None
    try:
        encoded, own_ids = _compiled(documents, identities, checked)
    except (TypeError, ValueError, OverflowError, RecursionError, MemoryError):
        return None
    return Encoded((encoded,)), own_ids
