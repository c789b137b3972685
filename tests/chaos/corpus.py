"""Seeded files for the chaos tests: bad lines among good ones, and no two bad lines alike."""

import json
import random
import string


def good(draw, number):
    """A line that must become a document; some contain edge cases of each type of value."""
    kind = draw.randrange(12)
    record = {
        "n": number,
        "text": "".join(draw.choices(string.ascii_letters + " ßé€☃\U0001f600", k=draw.randrange(80))),
    }
    if kind == 0:
        record["edges"] = [2**63 - 1, -(2**63), 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 0, -0.0, 1e308, 5e-324, 0.1]
    elif kind == 1:
        record["deep"] = json.loads("[" * 60 + "1" + "]" * 60)
    elif kind == 2:
        record = {"": number, "a.b": True, "$x": None, "text": "line\u2028sep\rlone"} | record
    elif kind == 3:
        record["digits"] = "9" * draw.randrange(18, 60)
    elif kind == 4:
        record["big"] = 1e300 * draw.random()
        record["exp"] = 12345678901234567890.5
    elif kind == 5:
        record["nested"] = {"list": [{"a": [1, 2.5, "x", None, False]}] * draw.randrange(6)}
    elif kind == 6:
        record["_id"] = f"own-{number}"
    elif kind == 7:
        record["_id"] = {"of": number, "part": draw.random()}
    return json.dumps(record, ensure_ascii=draw.random() < 0.5, separators=(",", ":")).encode()


REFUSED = "refused"
"""A key that the validator of the corpus's collection refuses."""

LONGEST = 256 * 1024
"""Longest line, in bytes, when the corpus is loaded; a longer one is rejected."""


def bad(draw, number):
    """A line that must become a reject, distinct for each `number`; together for all reasons but `invalid_utf8`."""
    tag = b"%d" % number
    wide = str(draw.choice([2**63, 2**64, -(2**63) - 1, 10**25, 10**400]) + number).encode()
    if wide.startswith(b"-"):
        wide = str(-(2**63) - 1 - number).encode()
    makers = [
        lambda: b'{"n":' + tag,
        lambda: b'{"n":' + tag + b",}",
        lambda: b'{"n":NaN,"t":' + tag + b"}",
        lambda: b'{"n":0' + tag + b"1}",
        lambda: b'{"n":"\\ud800' + tag + b'"}',
        lambda: b'{"n":"' + tag + b'\xff"}',
        lambda: b'{"n":"' + tag + b"\xed\xa0\x80" + b'"}',
        lambda: b'{"n":"' + tag + b'\x01"}',
        lambda: b"{'n':" + tag + b"}",
        lambda: tag + b" is no JSON",
        lambda: b'{"n":' + tag + b"}{}",
        lambda: b"[" * 1025 + tag + b"]" * 1025,
        lambda: b'{"n":' * 1026 + tag + b"}" * 1026,
        lambda: b"[" + tag + b"]",
        lambda: b'"' + tag + b'"',
        lambda: tag,
        lambda: b"-" + tag + b".5",
        lambda: b'{"n":' + wide + b"}",
        lambda: b'{"a":[{"b":' + wide + b'}],"s":"12345678901234567890"}',
        lambda: b'{"a\\u0000":' + tag + b"}",
        lambda: b'{"x":{"y\\u0000z":' + tag + b"}}",
        lambda: b'{"_id":[' + tag + b"]}",
        lambda: b'{"_id":{"$gt":' + tag + b"}}",
        lambda: b'{"a":' * 210 + tag + b"}" * 210,
        lambda: b'{"a":' * 500 + tag + b"}" * 500,
        lambda: b'{"_id":"own-rival","n":' + tag + b"}",
        lambda: b'{"refused":' + tag + b"}",
        lambda: b'{"n":' + tag + b',"t":"' + b"x" * LONGEST + b'"}',
    ]
    return makers[number % len(makers)]()


def mixed(path, seed, count, bad_share=0.1):
    """Write `count` lines, some bad or blank, with both kinds of line ends; for odd seeds, after a byte order mark.

    Returns the bad lines, which differ from those of all other seeds.
    """
    draw = random.Random(seed)
    wrong = []
    with path.open("wb") as out:
        out.write(b"\xef\xbb\xbf" if seed % 2 else b"")
        for number in range(count):
            if draw.random() < bad_share:
                line = bad(draw, seed * 10**6 + len(wrong))
                wrong.append(line)
            elif draw.random() < 0.02:
                line = draw.choice([b"", b" ", b"\t \t"])
            else:
                line = good(draw, number)
            out.write(line + (b"" if number == count - 1 and seed % 3 == 0 else draw.choice([b"\n", b"\n", b"\r\n"])))
    return wrong


def text(path, seed, count):
    """Write `count` lines of text, one in ten not UTF-8, with both kinds of line ends. Returns the bad ones."""
    draw = random.Random(seed)
    wrong = []
    with path.open("wb") as out:
        for number in range(count):
            line = "".join(
                draw.choices(string.printable[:-5] + "ßé€☃\U0001f600\u2028\x85", k=draw.randrange(60))
            ).encode()
            if number % 10 == 3:
                line = (
                    b"%d " % (seed * 10**6 + number)
                    + draw.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"])
                    + line
                )
                wrong.append(line)
            out.write(line + draw.choice([b"\n", b"\n", b"\r\n"]))
    return wrong


def plain(path, seed, count):
    """Write `count` ordinary records of about 200 bytes, one line in a thousand bad. Fast, for large files."""
    draw = random.Random(seed)
    words = "".join(draw.choices(string.ascii_letters, k=4000)).encode()
    with path.open("wb") as out:
        for number in range(count):
            at = draw.randrange(3800)
            if number % 1000 == 999:
                out.write(b'{"bad":%d\n' % number)
            else:
                part = words[at : at + 150]
                out.write(b'{"n":%d,"price":%d.5,"text":"%s","on":true}\n' % (number, at, part))
