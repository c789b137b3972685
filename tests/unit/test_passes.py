"""What a batch gives to the driver is what a plain pass gives, whether the extension encodes it or the driver itself."""

import json
import tracemalloc

import bson
import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from pymongo import message

from engine.model import Format
from engine.text import encode as encoding
from engine.text.decode import _LONG_PIECES, LONG_PIECE_BYTES, decode
from engine.text.encode import COMPILED, Encoded, encode
from tests.conftest import batch_of

TAG = b"tagtag"
IDENTITY = bytes(range(1, 13))

extension = pytest.mark.skipif(not COMPILED, reason="no C compiler was there when Headrace was installed")


def passed(lines, format=Format.NDJSON, offset=0):
    """The BSON of a pass for the driver, one item per piece or document; and the pass's indexes of own `_id`s."""
    documents = decode(batch_of(*lines, offset=offset), format, TAG, "key")
    parts = [part.raw if isinstance(part, Encoded) else bson.encode(part) for part in documents.encoded()]
    return b"".join(parts), documents.own_ids


def expected(lines, offset=0):
    """What the driver makes of the same lines, `_id` first."""
    made = b""
    for line in lines:
        document = json.loads(line)
        own = document.pop("_id", ObjectId(TAG + offset.to_bytes(6, "big")))
        made += bson.encode({"_id": own, **document})
        offset += len(line) + 1
    return made


def lacks(monkeypatch):
    """As where the extension could not be compiled."""
    monkeypatch.setattr(encoding, "_compiled", None)
    monkeypatch.setattr("engine.text.decode.COMPILED", False)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from([2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, -(2**63)])
    | st.integers(-(2**63), 2**63 - 1),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=40,
)
keys = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=6) | st.just("_id")


@extension
@given(st.lists(st.dictionaries(keys, json_values, max_size=6), min_size=1, max_size=8), st.integers(0, 2**40))
def test_any_documents_are_encoded_as_the_driver_does(documents, offset):
    try:
        lines = [json.dumps(document, ensure_ascii=False).encode() for document in documents]
        plain = expected(lines, offset)
    except (UnicodeEncodeError, bson.errors.InvalidDocument):
        return  # half of a surrogate pair, or a key with NUL
    assert passed(lines, offset=offset) == (plain, [i for i, document in enumerate(documents) if "_id" in document])


LINES = [b'{"a":1}', b"bad", b"", b'{"_id":5,"a":2}', b"[1]", b'{"a":3}', b'{"n":18446744073709551616}', b'{"a":4}']


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=extension), False])
@pytest.mark.parametrize("piece", [1, 20, 10**6])
def test_a_pass_for_the_driver_tells_what_a_pass_tells(compiled, piece, monkeypatch):
    monkeypatch.setattr("engine.text.decode.PIECE_BYTES", piece)
    if not compiled:
        lacks(monkeypatch)
    documents = decode(batch_of(*LINES, offset=100), Format.NDJSON, TAG, "key")
    for _ in range(2):
        assert documents.any()
        parts = list(documents.encoded())
        assert {type(part) for part in parts} == ({Encoded} if compiled else {dict})
        assert (documents.positions, documents.own_ids) == ([0, 3, 5, 7], [1])
        assert ([r.ordinal for r in documents.rejects], documents.blank) == ([1, 4, 6], 1)
        told = [part.raw if compiled else bson.encode(part) for part in parts]
        assert all(told)
        assert b"".join(told) == b"".join(map(bson.encode, documents))


NUMBERS = [
    b"0", b"-1.5", b"1e30", b"-2e19", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808",
    b"-9223372036854775809", b"18446744073709551615", b"18446744073709551616", b"9223372036854775808.0", b"1" * 60,
    b'"18446744073709551616"', b'"a\\u0000"', b"[" * 300 + b"36893488147419103232" + b"]" * 300,
]  # fmt: skip
LARGE = [
    (b'{"a":18446744073709551616}', False),
    (b'{"a":18446744073709551616,"a":1}', True),
    (b'{"a":1,"a":18446744073709551616}', False),
    (b'{"a":{"b":18446744073709551616},"a":{}}', True),
    (b'{"a":18446744073709551616,"a":1,"b":1e30}', True),
    (b'{"a":18446744073709551616,"a":29999999999999999999}', False),
    (b'{"a":-9223372036854775809,"a":-9223372036854775808}', True),
    (b'{"a":1e30}', True),
    (b'{"_id":1e30}', True),
    (b'{"a":[1e30,10000000000000000000000000000000]}', False),
    (b'{"a\\u0000":[[36893488147419103232]]}', False),
    (b'{"a\\u0000":[[1e30]],"b":"36893488147419103232"}', True),
]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=extension), False])
@pytest.mark.parametrize("beside", [b'{"a":2}', b"bad", b" ", b'{"a":1e30}', b'{"a":18446744073709551616}'])
@pytest.mark.parametrize(("line", "fits"), LARGE)
def test_an_integer_that_does_not_fit_is_refused_where_it_is_kept(line, fits, beside, compiled, monkeypatch):
    """Whatever is in its neighbours: the outcome of a line depends on its bytes alone."""
    if not compiled:
        lacks(monkeypatch)
    for lines, at in (([line], 0), ([beside, line], 1), ([line, beside], 0), ([b"{", b"", line, beside, b"{"], 2)):
        documents = decode(batch_of(*lines), Format.NDJSON, TAG, "key")
        for going in (documents.encoded(), documents):
            list(going)
            assert (at in documents.positions) == fits
            assert [r.reason for r in documents.rejects if r.ordinal == at] == ([] if fits else ["int_range"])


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([b"a", b"b", b"_id"]), st.sampled_from(NUMBERS)), max_size=4).map(
            lambda items: b"{" + b",".join(b'"%b":%b' % item for item in items) + b"}"
        )
        | st.sampled_from([b"", b"{", b"1"]),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([1, 100, 10**6]),
)
def test_a_pass_for_the_driver_refuses_what_a_pass_refuses(lines, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.text.decode.PIECE_BYTES", piece)
        documents = decode(batch_of(*lines), Format.NDJSON, TAG, "key")
        made = list(documents)
        told = documents.positions, documents.own_ids, documents.blank, documents.rejects
        given = b"".join(part.raw if isinstance(part, Encoded) else bson.encode(part) for part in documents.encoded())
        assert (documents.positions, documents.own_ids, documents.blank, documents.rejects) == told
        assert given == b"".join(bson.encode({"_id": document["_id"], **document}) for document in made)


@extension
@pytest.mark.parametrize("large", [10, 10**7])
def test_a_line_that_is_decoded_again_is_not_held_twice(large, monkeypatch):
    monkeypatch.setattr("engine.text.decode.LARGE_BYTES", large)

    def peak(identity):
        line = b'{"b":1e30,"id":"%b","a":[%b]}' % (identity, b",".join([b"{}"] * 50_000))
        documents = decode(batch_of(line), Format.NDJSON, TAG, "key")
        tracemalloc.start()
        [_] = documents.encoded()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(b"12345678901234567890") < 1.2 * peak(b"1234567890")


def test_a_long_line_is_parsed_and_encoded_while_no_other_is(monkeypatch):
    """The objects of one may take thirty times its length."""
    alone = []

    def watched(documents, identities, *, checked):
        alone.append(_LONG_PIECES.locked())
        return encode(documents, identities, checked=checked)

    monkeypatch.setattr("engine.text.decode.encode", watched)
    short, long = b'{"a":[]}', b'{"a":[%b]}' % b",".join([b"1"] * LONG_PIECE_BYTES)
    for _ in decode(batch_of(short, long), Format.NDJSON, TAG, "key").encoded():
        assert not _LONG_PIECES.locked()  # before the driver waits for the network
    assert alone == [False, True]


@extension
@pytest.mark.parametrize(("length", "count", "most"), [(100, 6000, 32), (20_000, 50, 128), (400_000, 2, 512)])
def test_a_piece_has_several_lines_unless_they_are_long(length, count, most):
    line = b'{"a":"%b"}' % (b"x" * length)
    parts = [len(part.raw) for part in decode(batch_of(*[line] * count), Format.NDJSON, TAG, "key").encoded()]
    assert max(parts) <= 1.5 * most * 1024
    assert len(parts) == pytest.approx(count * len(line) / (most * 1024), abs=2)


@extension
def test_the_objects_of_a_line_are_gone_when_the_driver_has_its_bytes():
    line = b'{"a":[%b]}' % b",".join([b"{}"] * 50_000)
    documents = decode(batch_of(line, line, line), Format.NDJSON, TAG, "key")
    tracemalloc.start()
    try:
        documents.any()
        for part in documents.encoded():
            assert tracemalloc.get_traced_memory()[0] < 1.5 * len(part.raw) < tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@extension
def test_a_piece_that_the_extension_refuses_is_left_to_the_driver_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr("engine.text.decode.PIECE_BYTES", 1)
    documents = decode(batch_of(b'{"a":1}', b'{"_id":1,"b\\u0000":1}', b'{"_id":3}'), Format.NDJSON, TAG, "key")
    first, second, third = documents.encoded()
    assert (type(first), second, type(third)) == (Encoded, {"_id": 1, "b\0": 1}, Encoded)
    assert documents.own_ids == [1, 2]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=extension), False])
def test_text_is_encoded_with_the_name_of_its_file(compiled, monkeypatch):
    if not compiled:
        lacks(monkeypatch)
    made, own_ids = passed([b"one", b"", "zwölf".encode()], Format.TEXT)
    plain = [(0, "one"), (5, "zwölf")]
    assert made == b"".join(
        bson.encode({"_id": ObjectId(TAG + offset.to_bytes(6, "big")), "content": content, "originalFile": "key"})
        for offset, content in plain
    )
    assert own_ids == []


@extension
def test_a_message_holds_each_document_of_a_piece():
    """As the driver writes it: `Encoded` stands for several documents where the driver expects one."""
    documents = [{"a": 1}, {"b": "x" * 1000}, {}]
    encoded, _ = encode(documents, IDENTITY * 3, checked=False)
    plain = [{"_id": ObjectId(IDENTITY), **document} for document in documents]
    assert sent([encoded, {"_id": 9}, encoded]) == sent([*plain, {"_id": 9}, *plain])
    assert message._dict_to_bson(encoded, False, OPTIONS) == b"".join(map(bson.encode, plain))


OPTIONS = bson.codec_options.DEFAULT_CODEC_OPTIONS


def sent(documents):
    """The message that the driver sends with these documents, without the number of the request."""
    return message._op_msg_uncompressed(0, {"insert": "c", "$db": "d"}, "documents", documents, OPTIONS)[1][8:]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=extension), False])
@pytest.mark.parametrize("format", [Format.NDJSON, Format.TEXT])
@pytest.mark.parametrize("line", [b"\xff" * 99, b" " * 99], ids=["bad", "blank"])
@pytest.mark.parametrize("where", ["first", "between", "last"])
def test_pieces_without_documents_are_no_part_of_a_message(compiled, format, line, where, monkeypatch):
    if not compiled:
        lacks(monkeypatch)
    good = [b'{"a":1}'] * 3
    rest = [line] * 2000
    lines = {"first": rest + good, "between": good + rest + good, "last": good + rest}[where]
    documents = decode(batch_of(*lines), format, TAG, "key")
    plain = sent(list(decode(batch_of(*lines), format, TAG, "key")))
    assert documents.any()
    assert sent(documents.encoded()) == plain
    assert len(documents.positions) == len(lines) - 2000 == len(plain[plain.index(b"documents") :].split(b"_id")) - 1


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=extension), False])
def test_a_command_that_the_driver_sends_again_has_its_documents_again(compiled, monkeypatch):
    monkeypatch.setattr("engine.text.decode.PIECE_BYTES", 20)
    if not compiled:
        lacks(monkeypatch)
    documents = decode(batch_of(*LINES), Format.NDJSON, TAG, "key")
    given = documents.encoded()
    first = sent(given)
    told = documents.positions, documents.own_ids, documents.blank, len(documents.rejects)
    assert sent(given) == first == sent(list(documents))
    assert (documents.positions, documents.own_ids, documents.blank, len(documents.rejects)) == told
