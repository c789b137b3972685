"""The extension encodes documents as the driver does, byte for byte, and leaves to it what it does not take."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import bson
import pytest
from bson import ObjectId

from engine.text.encode import COMPILED, Identity, encode

IDENTITY = bytes(range(1, 13))

extension = pytest.mark.skipif(not COMPILED, reason="no C compiler was there when Headrace was installed")


VALUES = [
    {},
    [],
    [[]],
    {"a": {}},
    "",
    "ascii",
    "zwölf €",
    "𝄞",
    "a\0b",
    "x" * 70_000,
    "ß" * 40_000,
    None,
    True,
    False,
    [True, False, None],
    0,
    -1,
    2**31 - 1,
    2**31,
    -(2**31),
    -(2**31) - 1,
    2**63 - 1,
    -(2**63),
    0.0,
    -0.0,
    1.0,
    5e-324,
    1.7976931348623157e308,
    -1e-7,
    list(range(12)),
    [None] * 1001,
    list(range(11_000)),
    {str(number): number for number in range(300)},
    {"$ref": "a", "$id": 1},
    {"$oid": "0" * 24},
    {"": {"": [""]}},
    {"a.b": 1, "$c": 2},
    {"_id": 1, "a": {"_id": 1}},
    {"zwölf": {"€": 1}},
]


@extension
@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{len(repr(value))}")
def test_a_value_is_encoded_as_the_driver_does(value):
    documents = [{"a": value}, {"b": 1, "c": value, "d": [value, {"e": value}]}]
    plain = b"".join(bson.encode({"_id": ObjectId(IDENTITY), **document}) for document in documents)
    assert encode(documents, IDENTITY * 2, checked=True) == ((plain,), [])


@extension
def test_an_id_of_its_own_comes_first_and_only_once():
    documents = [{"n": 1}, {"a": 7, "_id": 7, "b": 7}, {"_id": None}, {"_id": "x", "n": 1}]
    encoded, own_ids = encode(documents, IDENTITY * 4, checked=False)
    assert own_ids == [1, 2, 3]
    plain = [{"_id": ObjectId(IDENTITY), "n": 1}, {"_id": 7, "a": 7, "b": 7}, {"_id": None}, {"_id": "x", "n": 1}]
    assert encoded.raw == b"".join(map(bson.encode, plain))


def nested(levels):
    value = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"a\0b": 1},
        2**63,
        -(2**63) - 1,
        2**64,
        10**40,
        nested(400),
        nested(900),
        ObjectId(),
        (1,),
        {1: 2},
        {None: 1},
        b"a",
    ],
    ids=lambda value: str(type(value)),
)
def test_what_is_no_json_that_fits_is_left_to_the_driver(value):
    """Among others, whatever was written before it."""
    assert encode([{"b": "x" * 100_000}, {"a": value}], IDENTITY * 2, checked=True) is None
    assert encode([{"_id": value}], IDENTITY, checked=True) is None


@extension
@pytest.mark.parametrize("number", [2.0**63, -(2.0**63), 1e30, -1e30, 1.7976931348623157e308])
@pytest.mark.parametrize("where", ["_id", "a"])
def test_a_float_that_was_perhaps_an_integer_is_encoded_only_if_it_was_checked(number, where):
    for value in (number, [number], {"a": [{"b": number}]}):
        document = {where: value}
        assert encode([{"a": 1}, document], IDENTITY * 2, checked=False) is None
        encoded, _ = encode([document], IDENTITY, checked=True)
        assert encoded.raw == bson.encode({"_id": ObjectId(IDENTITY), **document})
    below = {where: [math.nextafter(2.0**63, 0), -math.nextafter(2.0**63, 0)]}
    assert encode([below], IDENTITY, checked=False) is not None


@extension
def test_types_that_only_resemble_those_of_a_parser_are_left_to_the_driver():
    class Text(str):
        __slots__ = ()

    class Mapping(dict):
        pass

    for document in (Mapping(), {"a": Mapping()}, {Text("a"): 1}, {"a": Text("a")}):
        assert encode([document], IDENTITY, checked=True) is None


@extension
@pytest.mark.parametrize(
    "given",
    [
        ([{}], b"", True),
        ([{}], b"x" * 13, True),
        ([{}], IDENTITY * 2, True),
        ((), b"", True),
        ([], "", True),
        ([], b"", 1),
    ],
)
def test_a_call_with_wrong_arguments_is_a_fault_of_the_program(given):
    *two, checked = given
    with pytest.raises(AssertionError):
        encode(*two, checked=checked)


@extension
@pytest.mark.parametrize("text", ["x", "ß"])
def test_what_is_large_is_left_to_the_driver(text):
    length = (2**23 - 100) // len(text.encode())
    encoded, _ = encode([{"a": text * length}], IDENTITY, checked=False)
    assert encoded.raw == bson.encode({"_id": ObjectId(IDENTITY), "a": text * length})
    assert encode([{"a": text * length}, {"a": text * (length // 8)}], IDENTITY * 2, checked=False) is None
    assert encode([{"a": text * (2 * length)}], IDENTITY, checked=False) is None
    assert encode([{"a": [0] * 2_000_000}], IDENTITY, checked=False) is None


@extension
@pytest.mark.parametrize("element", ["1", "[]", "{}", "[1,2]", '""', "1.5"])
def test_a_line_of_a_mebibyte_is_not_large_whatever_it_holds(element):
    values = ",".join([element] * (2**20 // (len(element) + 1)))
    assert encode([{"a": json.loads(f"[{values}]")}], IDENTITY, checked=False) is not None


def test_a_generated_id_is_encoded_as_the_object_id_of_its_bytes():
    assert bson.encode({"_id": Identity((IDENTITY,))}) == bson.encode({"_id": ObjectId(IDENTITY)})


@extension
def test_encoding_keeps_nothing():
    value, bad = ["x", "ß" * 40_000], {"b\0": 1}
    documents, refused = [{"a": value, "_id": "own"}] * 10, [{"a": value}, bad]

    def many():
        for _ in range(200):
            assert encode(documents, IDENTITY * 10, checked=False) is not None
            assert encode(refused, IDENTITY * 2, checked=False) is None
        gc.collect()

    many()
    counts = [sys.getrefcount(thing) for thing in (value, documents[0], bad, IDENTITY, "own")]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    many()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert kept < 10_000
    assert [sys.getrefcount(thing) for thing in (value, documents[0], bad, IDENTITY, "own")] == counts


def test_the_extension_is_there_where_it_can_be_compiled():
    """Loads would not tell: without it, they only take longer."""
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    assert (shutil.which(compiler.split()[0]) is not None and header.exists()) == COMPILED


def test_without_the_extension_the_module_says_so():
    code = "import sys; sys.modules['engine.text._bson'] = None; from engine.text.encode import COMPILED, encode; "
    code += "print(COMPILED, encode([{}], bytes(12), checked=True))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False None\n"
