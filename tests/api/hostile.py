"""Strings that break careless code that reads them."""

import random
import string

HOSTILE = [
    "",
    " ",
    "\x00",
    "../../etc/passwd",
    "..\\..\\windows",
    "{$ne: null}",
    '{"$gt": ""}',
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>",
    "%00",
    "%2e%2e%2f",
    "%c0%ae",
    "\ufeff",
    "\u202e",
    "\U0001f600" * 50,
    "A" * 4000,
    "-1",
    "1e999",
    "NaN",
    "true",
    "null",
    "[]",
    "{}",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "\r\nX-Injected: 1",
    "$where",
    "__proto__",
    "0x41",
    "9" * 400,
]


def hostile(seed):
    """Five hundred strings: `HOSTILE`, and seeded random ones of characters that tend to break parsers."""
    draw = random.Random(seed)
    letters = string.printable + "\x00\x7f\x80ÿßあ\u2028\ud7ff\ufffe" + "%{}$[]\"'\\" * 5
    return HOSTILE + ["".join(draw.choices(letters, k=draw.randrange(1, 60))) for _ in range(500 - len(HOSTILE))]
