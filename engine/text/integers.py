"""Finds integers that int64 cannot hold in the bytes of lines, quickly where there are none. Pure.

orjson silently turns an integer beyond 64 bits into a float. Where large numbers are not seen as they are encoded, they
are searched for in the bytes, in up to three passes, each slower and more exact than the one before:
`may_have_wide_digits` over a batch, `has_wide_digits` over a piece of it, `beyond_int64` over one line.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import orjson

__all__ = ["beyond_int64", "has_wide_digits", "may_have_wide_digits"]

SPARSE_BYTES: Final = 4096
"""Possible places of a long run of digits are checked one by one if there is at most one per this many bytes; otherwise
a scan of all bytes is as fast."""

# The smallest integer outside int64 has 19 digits. With each digit replaced by '0', one `find` locates a run of 19.
_ZEROS: Final = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))
_RUN: Final = b"0" * 19
_DIGIT_RUN: Final = re.compile(rb"0++")
_INT64_MAX_LITERAL: Final = b"%d" % (2**63 - 1)
_INT64_MIN_LITERAL: Final = b"%d" % 2**63

# Strings are matched first, so that digits within them are skipped; then numbers in full, to tell if they are integers.
_TOKEN: Final = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"|(-?\d{19,}+)((?:\.\d+)?(?:[eE][+-]?\d+)?)|\d++(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL
)
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
_DIGITS: Final = b"0123456789"

# A literal of this many digits is certainly not an int64. It is not passed to int(), which refuses thousands of digits.
_CERTAINLY_WIDE: Final = 40


def may_have_wide_digits(data: bytes) -> bool:
    """Whether an integer may be outside int64; False is certain. Six times as fast as a scan of every byte.

    Such an integer has at least 19 digits, which always cover four whole words of four bytes and three more bytes next
    to them. A byte counts as a digit if its upper four bits are 3: 0 to 9, and :;<=>?.
    """
    words = np.frombuffer(data, "<u4", len(data) // 4) & np.uint32(0xF0F0F0F0) == np.uint32(0x30303030)
    at = 4 * np.flatnonzero(words[:-3] & words[1:-2] & words[2:-1] & words[3:])
    if not len(at):
        return False
    if at[0] < 3 or at[-1] + 22 > len(data):
        return True  # too close to the edge to look at the bytes around it
    # Fractions have up to 17 digits, so there may be many such places: they are all checked at once.
    octets = np.frombuffer(data, np.uint8)
    before, behind = (
        digits[0] * (1 + digits[1] * (1 + digits[2].astype(np.uint8)))
        for digits in ([octets[at + away] & 0xF0 == 0x30 for away in aways] for aways in ((-1, -2, -3), (16, 17, 18)))
    )
    places = at[before + behind >= 3]
    if len(places) > len(data) // SPARSE_BYTES:
        return True  # a scan of every byte takes no longer
    return any(_wide_at(data, place) for place in places.tolist())


def _wide_at(data: bytes, place: int) -> bool:
    """Whether the run of digits around a place may be an integer that int64 cannot hold."""
    left = data[max(place - _CERTAINLY_WIDE, 0) : place]
    before = left.rstrip(_DIGITS)
    right = data[place : place + _CERTAINLY_WIDE]
    start, end = place - len(left) + len(before), place + len(right) - len(right.lstrip(_DIGITS))
    if end - start < len(_RUN) or before.endswith(b"."):
        return False
    most = _INT64_MIN_LITERAL if before.endswith(b"-") else _INT64_MAX_LITERAL
    return end - start > len(_RUN) or data[start:end] > most


def has_wide_digits(data: bytes) -> bool:
    """Whether any run of digits may be an integer that int64 cannot hold; scans all bytes, and few of them twice."""
    zeros = data.translate(_ZEROS)
    if zeros.rfind(_RUN) < 0:
        return False  # true of most data; searching from the right is faster by a third
    at = zeros.find(_RUN)
    while at >= 0:
        run = _DIGIT_RUN.match(zeros, at)
        assert run is not None  # it begins there
        before, end = zeros[at - 1 : at], run.end()
        most = _INT64_MIN_LITERAL if before == b"-" else _INT64_MAX_LITERAL
        # Digits after a decimal point are a fraction.
        if before != b"." and (end - at > len(_RUN) or data[at:end] > most):
            return True
        at = zeros.find(_RUN, end)
    return False


def beyond_int64(line: bytes, document: Any) -> str | None:
    """An integer literal, shortened, that int64 cannot hold and whose value is in a document; None if there is none.

    Under a repeated key, only the last value is in the document.

    Args:
        line: a valid JSON text.
        document: what orjson makes of it.
    """
    if not has_wide_digits(line):
        return None
    literals: dict[int | float, str] = {}  # by what the parser makes of them
    for match in _TOKEN.finditer(line):
        digits, rest = match.groups()
        if digits is None or rest:
            continue
        if len(digits) >= _CERTAINLY_WIDE or not _INT64_MIN <= int(digits) <= _INT64_MAX:
            literals.setdefault(orjson.loads(digits), digits.decode("ascii"))
    if not literals:
        return None
    literal = next((literals[number] for number in _candidates(document) if number in literals), None)
    return literal[:_CERTAINLY_WIDE] + "…" if literal and len(literal) > _CERTAINLY_WIDE else literal


def _candidates(document: Any) -> Iterator[int | float]:
    """The numbers of a document but for integers that int64 holds. Not recursive, since a line may be nested deeply."""
    levels: list[Iterator[Any]] = [iter((document,))]
    while levels:
        for value in levels[-1]:
            if isinstance(value, dict | list):
                levels.append(iter(value.values() if isinstance(value, dict) else value))
                break
            kind = type(value)
            if kind is float or (kind is int and not _INT64_MIN <= value <= _INT64_MAX):
                yield value
        else:
            levels.pop()
