"""What kind of text an object is, from its name and its first bytes. Pure: no I/O."""

import re
from typing import Final

from engine.errors import Refused
from engine.model import Format
from engine.text.decode import BOM

__all__ = ["begins", "decide"]

WIDE_SAMPLE: Final = 4096
"""How many of the first bytes are examined for UTF-16 and UTF-32."""

_NDJSON_SUFFIXES: Final = (".ndjson", ".jsonl", ".json")
_TEXT_SUFFIXES: Final = (".txt", ".log")
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "a zip archive",
    b"\x04\x22\x4d\x18": "LZ4",
}
_BZIP2: Final = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
_PRETTY: Final = re.compile(rb"\s*\{[ \t\r]*\n")


def decide(asked: Format, key: str, head: bytes) -> Format:
    """The format of an object whose first bytes are `head`.

    Raises:
        Refused: it is not line-oriented text, or it is JSON that is not newline-delimited.
    """
    kinds = [name for magic, name in _COMPRESSED.items() if head.startswith(magic)]
    if kinds := kinds or ["bzip2"] * bool(_BZIP2.match(head)):
        raise Refused(f"{key} is compressed ({kinds[0]}): decompress it before you upload it")
    # UTF-16 or UTF-32 text begins with a byte order mark, or has NULs in each ASCII character.
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")) or _looks_wide(head):
        raise Refused(f"{key} looks like UTF-16 or UTF-32: convert it to UTF-8, for example with iconv")
    if asked is not Format.AUTO:
        return asked
    name = key.lower()
    first = begins(head)
    if name.endswith(_TEXT_SUFFIXES):
        return Format.TEXT
    if not name.endswith((".ndjson", ".jsonl")) and (first == b"[" or _PRETTY.match(head.removeprefix(BOM))):
        what = "one JSON array" if first == b"[" else "one JSON document over many lines"
        raise Refused(
            f"{key} begins like {what}, not with one document per line: write one document per line, "
            'or set {"format": "ndjson"} or {"format": "text"} if it is correct as it is'
        )
    if name.endswith(_NDJSON_SUFFIXES) or first == b"{":
        return Format.NDJSON
    return Format.TEXT


def begins(head: bytes) -> bytes:
    """The first byte that is not blank; empty if all are blank."""
    return head.removeprefix(BOM).lstrip()[:1]


def _looks_wide(head: bytes) -> bool:
    """Whether it looks like UTF-16 or UTF-32: in mostly ASCII text most high bytes are NUL, and hardly any low byte is.
    A run of NULs, as in a log that was cut off while it was written, does not count."""
    sample = head[: min(WIDE_SAMPLE, len(head)) // 4 * 4]
    half, quarter = len(sample) // 2, len(sample) // 4
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if half >= 4 and max(even, odd) >= 0.4 * half and min(even, odd) <= 0.1 * half:
        return True
    fewest, *others = sorted(sample[at::4].count(0) for at in range(4))
    return half >= 4 and min(others) >= 0.4 * quarter and fewest <= 0.1 * quarter
