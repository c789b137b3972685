"""An object's format is decided by its name and its first bytes; an object that cannot be loaded is refused."""

import bz2
import gzip
import lzma
import zipfile
from io import BytesIO

import pytest

from engine.errors import Refused
from engine.model import Format
from engine.text.formats import decide

TEXT = "".join(f'{{"n": {n}, "name": "Grüße {n}"}}\n' for n in range(50))


@pytest.mark.parametrize(
    ("key", "head", "format"),
    [
        ("a.ndjson", b"anything", Format.NDJSON),
        ("a.JSONL", b"[1]\n", Format.NDJSON),
        ("a.json", b"\xef\xbb\xbf {}", Format.NDJSON),
        ("a.txt", b'{"a": 1}\n', Format.TEXT),
        ("a.log", b"[2026-11-24] it began\n", Format.TEXT),
        ("a", b'\n \n{"a": 1}\n', Format.NDJSON),
        ("a", b'\xef\xbb\xbf{"a": 1}\n', Format.NDJSON),
        ("a", b"plain words\n", Format.TEXT),
        ("a.csv", b"a,b\n1,2\n", Format.TEXT),
        ("a", b"", Format.TEXT),
        ("a", b"BZh is how these words begin\n", Format.TEXT),
        ("a", b"BZh9 and these\n", Format.TEXT),
        ("a", b"PK is no archive\n", Format.TEXT),
        ("a", b"\0\0", Format.TEXT),
        ("a", b"\0a\0", Format.TEXT),
        ("a", b"it began\n" * 20 + bytes(4000), Format.TEXT),
        ("a", "Ελληνικά, русский, 日本語\n".encode() * 9, Format.TEXT),
        ("a", b"some\x00NUL\x00bytes\x00between\x00words of eight bits\n" * 9, Format.TEXT),
    ],
)
def test_the_extension_decides_and_then_the_first_bytes(key, head, format):
    assert decide(Format.AUTO, key, head) is format


@pytest.mark.parametrize("key", ["a.json", "a", "a.dat"])
@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b" [{}]", "array"),
        (b"\xef\xbb\xbf[{}]", "array"),
        (b'{\r\n  "a": 1\r\n}\n', "over many lines"),
        (b'\xef\xbb\xbf{\n  "a": 1\n}\n', "over many lines"),
    ],
)
def test_json_that_is_no_document_a_line_is_refused(key, head, what):
    with pytest.raises(Refused, match=what):
        decide(Format.AUTO, key, head)


@pytest.mark.parametrize("asked", [Format.NDJSON, Format.TEXT])
def test_what_is_asked_for_wins(asked):
    assert decide(asked, "a.csv", b"[1, 2]") is asked


def zipped():
    made = BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a.ndjson", TEXT)
    return made.getvalue()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (gzip.compress(TEXT.encode()), "gzip"),
        (bz2.compress(TEXT.encode()), "bzip2"),
        (bz2.compress(b""), "bzip2"),
        (lzma.compress(TEXT.encode()), "xz"),
        (zipped(), "zip"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "Zstandard"),
        (b"\x04\x22\x4d\x18\x64\x40", "LZ4"),
    ],
)
@pytest.mark.parametrize("asked", list(Format))
def test_a_compressed_object_is_refused_whatever_is_asked_for(asked, head, kind):
    with pytest.raises(Refused, match=kind):
        decide(asked, "a.ndjson", head)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_characters_are_refused_with_a_mark_and_without(encoding):
    with pytest.raises(Refused, match="iconv"):
        decide(Format.AUTO, "a.ndjson", TEXT.encode(encoding))


def test_one_json_array_is_refused_with_the_way_out():
    with pytest.raises(Refused, match="write one document per line"):
        decide(Format.AUTO, "a.json", b'[\n{"a": 1},\n')
