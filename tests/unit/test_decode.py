"""A line that is not blank becomes one document or one reject: it never raises, and no number ever changes."""

import json
from types import SimpleNamespace

import bson
import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from engine.model import Format
from engine.text.decode import decode
from tests.conftest import batch_of

TAG = b"tagtag"


def run(*lines: bytes, format: Format = Format.NDJSON, offset: int = 0, terminated: bool = True):
    decoded = decode(batch_of(*lines, offset=offset, terminated=terminated), format, TAG, "key")
    return SimpleNamespace(documents=list(decoded), **vars(decoded))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "invalid_json"),
        (b'{"a":NaN}', "invalid_json"),
        (b'{"a":"\\ud800"}', "invalid_json"),
        (b'{"a":"\xff"}', "invalid_json"),
        (b'{"a":1}\x00', "invalid_json"),
        (b"[" * 1025 + b"]" * 1025, "invalid_json"),
        (b"[1]", "not_an_object"),
        (b'"a"', "not_an_object"),
        (b"1", "not_an_object"),
        (b"1.5", "not_an_object"),
        (b"null", "not_an_object"),
        (b"true", "not_an_object"),
        (b'{"a":9223372036854775808}', "int_range"),
        (b'{"a":-9223372036854775809}', "int_range"),
        (b'{"a":[{"b":18446744073709551616}]}', "int_range"),
        (b'{"a":"\\"","b":1' + b"0" * 300 + b"}", "int_range"),
    ],
)
def test_a_bad_line_is_a_reject_with_its_offset_and_its_neighbours_come_through(line, reason):
    decoded = run(b'{"n":1}', line, b'{"n":2}', offset=100)
    assert [document["n"] for document in decoded.documents] == [1, 2]
    assert [(r.reason, r.offset, r.length, r.ordinal) for r in decoded.rejects] == [(reason, 108, len(line), 1)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":9223372036854775807}',
        b'{"a":-9223372036854775808}',
        b'{"a":"18446744073709551616"}',
        b'{"a":"99999999999999999999","b":9223372036854775807,"c":-9223372036854775808}',
        b'{"18446744073709551616":1}',
        b'{"a":18446744073709551616.0}',
        b'{"a":18446744073709551616e0}',
        b'{"a":0.18446744073709551616}',
        b'{"a":"\\\\","b":"99999999999999999999"}',
    ],
)
def test_what_only_looks_like_a_large_integer_is_kept(line):
    [document] = run(line).documents
    assert {name: value for name, value in document.items() if name != "_id"} == json.loads(line)


def test_a_generated_id_is_the_tag_and_the_offset():
    decoded = run(b"{}", b'{"_id":7}', b"{}", offset=1000)
    assert [bson.decode(bson.encode(d))["_id"] for d in decoded.documents] == [
        ObjectId(TAG + (1000).to_bytes(6, "big")),
        7,
        ObjectId(TAG + (1013).to_bytes(6, "big")),
    ]
    assert decoded.own_ids == [1]


def test_the_byte_order_mark_belongs_to_line_one_and_is_ignored():
    decoded = run(b'\xef\xbb\xbf{"a":1}', b"{}")
    assert [d["_id"].binary[6:] for d in decoded.documents] == [bytes(6), (11).to_bytes(6, "big")]
    assert run(b"\xef\xbb\xbfa", b"b", format=Format.TEXT).documents[0]["content"] == "a"


def test_a_carriage_return_before_the_newline_is_dropped_and_one_at_the_very_end_is_not():
    decoded = run(b"a\r", b"b\r", format=Format.TEXT, terminated=False)
    assert [d["content"] for d in decoded.documents] == ["a", "b\r"]


def test_blank_lines_are_counted():
    assert run(b"", b" \t\r", b"{}").blank == 2
    assert run(b"", b" \t\r", b"x", format=Format.TEXT).blank == 2


def test_text_that_is_not_utf8_is_a_reject():
    decoded = run(b"good", b"b\xffd", "schön".encode(), format=Format.TEXT)
    assert [d["content"] for d in decoded.documents] == ["good", "schön"]
    assert [(r.reason, r.offset) for r in decoded.rejects] == [("invalid_utf8", 5)]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def integers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for item in value for n in integers(item)]
    return [value] if type(value) is int else []


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_every_object_comes_through_unchanged_or_is_rejected_for_its_integers(value):
    value.pop("_id", None)
    try:
        line = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    decoded = run(line)
    if all(-(2**63) <= n < 2**63 for n in integers(value)):
        [document] = decoded.documents
        document.pop("_id")
        assert document == value
    else:
        assert [r.reason for r in decoded.rejects] == ["int_range"]


@given(
    st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), min_size=1),
    st.sampled_from(["ndjson", "text"]),
)
def test_each_line_of_any_bytes_ends_as_one_thing(lines, format):
    decoded = run(*lines, format=Format(format))
    assert len(decoded.documents) + len(decoded.rejects) + decoded.blank == len(lines)


EDGES = [
    2**63 - 1,
    2**63,
    -(2**63),
    -(2**63) - 1,
    2**64 - 1,
    2**64,
    10**18,
    10**19,
    -(10**19),
    1_700_000_000_000_000_000,
]


@given(
    st.lists(
        st.one_of(
            st.sampled_from(EDGES),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text("0123456789.-"),
        ),
        max_size=6,
    )
)
def test_a_document_is_refused_exactly_when_an_integer_of_it_does_not_fit(values):
    line = json.dumps({"a": values}).encode()
    fits = all(-(2**63) <= value < 2**63 for value in values if type(value) is int)
    decoded = run(b'{"n":1}', line, b'{"n":2}')
    assert [str(r.reason) for r in decoded.rejects] == ([] if fits else ["int_range"])
    assert len(decoded.documents) == (3 if fits else 2)


FRAGMENTS = [
    b'{"a":1}', b'{"a":[1', b"2]}", b'{"a":1', b'"b":2}', b'{"a":1},{"b":2}', b"{", b"}", b"[", b"]", b",", b"", b" ",
    b"1", b'{"_id":5}', b'{"a":"', b'"}', b'{"a":1}\r', b'{"a":1}\xef\xbb\xbf', b"\xef\xbb\xbf{}", b'{"a":"\\',
    b'{"n":18446744073709551616}', b'{"n":9223372036854775807}', b'{"t":"0123456789:;<=>?0123456789:;<=>?"}', b"{}",
    b'{"a":1},4611686018427387904,{"b":2}', b"\xff", b"{" * 1100, b'{"long":"' + b"x" * 90 + b'"}',
]  # fmt: skip

# In each list, every line is bad, but read together as one text, they are as many objects as there are lines.
CONSPIRACIES = [
    [b'{"a":1', b'"b":2}', b'{"a":1},{"b":2}'],
    [b'{"c":3},{"d":4}', b'{"a":[1', b"2]}"],
    [b'{"a":[1', b"2", b'3]},{"b":1},{"c":2}'],
    [b'{"a":[{}', b'{}]},{"b":1}'],
    [b'{"a":[1', b"2]}", b'{"b":1},5,{"c":2}'],  # a guess at the mark that is put between lines
]
LINE = st.sampled_from(FRAGMENTS) | st.binary(max_size=8).map(lambda b: b.replace(b"\n", b""))


@pytest.mark.parametrize("long", [0, 10**6])
@pytest.mark.parametrize("lines", CONSPIRACIES)
def test_lines_that_are_objects_only_together_are_rejects_each(lines, long, monkeypatch):
    monkeypatch.setattr("engine.text.decode.LONG_LINE_BYTES", long)
    decoded = run(b'{"n":1}', *lines, b'{"n":2}')
    assert [document["n"] for document in decoded.documents] == [1, 2]
    assert [r.ordinal for r in decoded.rejects] == list(range(1, 1 + len(lines)))


@given(
    st.lists(LINE, min_size=1),
    st.sampled_from([1, 40, 10**6]),
    st.sampled_from([0, 10**6]),
    st.sampled_from(["ndjson", "text"]),
    st.booleans(),
)
def test_what_becomes_of_a_line_does_not_depend_on_its_neighbours(lines, piece, long, format, terminated):
    terminated = terminated or not lines[-1]  # without a newline, an empty last line does not exist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.text.decode.PIECE_BYTES", piece)
        patch.setattr("engine.text.decode.LONG_LINE_BYTES", long)
        together = run(*lines, format=Format(format), offset=7, terminated=terminated)
    at, documents, positions, own_ids, rejects, blank = 7, [], [], [], [], 0
    for position, line in enumerate(lines):
        last = position == len(lines) - 1
        alone = run(line, format=Format(format), offset=at, terminated=terminated or not last)
        own_ids += [len(documents)] * len(alone.own_ids)
        documents += alone.documents
        positions += [position] * len(alone.documents)
        rejects += [(position, r.reason, r.offset, r.length, r.head) for r in alone.rejects]
        blank += alone.blank
        at += len(line) + 1
    assert [encoded(d) for d in together.documents] == [encoded(d) for d in documents]
    assert (list(together.positions), together.own_ids, together.blank) == (positions, own_ids, blank)
    assert [(r.ordinal, r.reason, r.offset, r.length, r.head) for r in together.rejects] == rejects


def encoded(document):
    try:
        return bson.encode(document)
    except bson.errors.InvalidDocument as error:
        return str(error)


@pytest.mark.parametrize("piece", [1, 10**6])
def test_each_pass_over_the_documents_gives_them_again(piece, monkeypatch):
    monkeypatch.setattr("engine.text.decode.PIECE_BYTES", piece)
    documents = decode(batch_of(b'{"a":1}', b"bad", b"", b'{"a":2}'), Format.NDJSON, TAG, "key")
    for _ in range(3):
        assert documents.any()
        assert [document["a"] for document in documents] == [1, 2]
        assert (documents.positions, len(documents.rejects), documents.blank) == ([0, 3], 1, 1)
    assert list(documents.encoded())
    assert (documents.positions, len(documents.rejects), documents.blank) == ([0, 3], 1, 1)


def test_a_batch_of_bad_and_blank_lines_has_no_documents_and_tells_of_each():
    documents = decode(batch_of(b"bad", b"", b"[]"), Format.NDJSON, TAG, "key")
    assert not documents.any()
    assert [str(r.reason) for r in documents.rejects] == ["invalid_json", "not_an_object"]
    assert documents.blank == 1


def test_a_line_that_is_no_utf8_is_told_where():
    line = b'{"caf":"\xc3\xa9","b":"\xe9"}'
    [found] = run(line).rejects
    assert found.detail == "byte 17 of the line, 0xe9: invalid continuation byte"


@pytest.mark.parametrize("format", [Format.NDJSON, Format.TEXT])
def test_a_carriage_return_is_no_part_of_a_reject_but_at_the_very_end(format):
    def rejects(terminated):
        found = run(b"\xff\r", b"{}", b"\xfe\r", format=format, terminated=terminated).rejects
        return [(r.offset, r.length, r.head) for r in found]

    assert rejects(True) == [(0, 1, b"\xff"), (6, 1, b"\xfe")]
    assert rejects(False) == [(0, 1, b"\xff"), (6, 2, b"\xfe\r")]


def test_of_a_long_bad_line_the_first_64_kib_are_kept():
    [found] = run(b"{}", b"bad" * 40_000).rejects
    assert (found.length, found.head) == (120_000, (b"bad" * 40_000)[: 64 * 1024])


def test_of_a_repeated_key_the_integer_that_is_told_is_the_last():
    [found] = run(b'{"a":18446744073709551616,"a":[{"b":29999999999999999999}]}').rejects
    assert found.detail.startswith("the integer 29999999999999999999 ")


def test_an_integer_of_any_length_is_told_in_a_few_digits():
    [found] = run(b'{"a":1' + b"0" * 300 + b"}").rejects
    assert found.detail == f"the integer 1{'0' * 39}… is outside the range of a signed 64-bit integer"
