"""The README is true: its tables match the code, and the files and make targets that it names exist."""

import ast
import re
from pathlib import Path

from engine.errors import (
    AccessDenied,
    Conflict,
    KeyReused,
    NotFound,
    Permanent,
    Refused,
    TokenExpired,
    Transient,
    WrongClock,
)
from engine.model import Reason
from engine.settings import Settings
from tests.chaos.scenarios import SCENARIOS
from tests.unit.test_imports import FLOORS, modules

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def shown(value, unit):
    """A default, as the table shows it."""
    if value is None:
        return "–"
    if unit == "bytes":
        power = max(p for p in range(4) if value % 1024**p == 0)
        return f"{value // 1024**power} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
    return f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`"


def row(name, field):
    unit = field.json_schema_extra["unit"]
    default = field.json_schema_extra["in_words"] if field.default_factory else shown(field.default, unit)
    return f"| `{name.upper()}` | {default} | {unit or '–'} | {field.description} |"


def test_the_table_of_settings_is_that_of_the_code():
    wanted = [row(name, field) for name, field in Settings.model_fields.items()]
    found = re.findall(r"^\| `[A-Z_0-9]+` \| .* \|$", README, re.MULTILINE)
    assert "\n".join(found) == "\n".join(wanted)


def test_the_example_of_an_environment_names_settings_that_exist():
    names = set(re.findall(r"^#? ?([A-Z_0-9]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert names
    assert names <= {name.upper() for name in Settings.model_fields}


def test_every_reason_of_a_reject_is_told():
    section = README.split("## What a bad line becomes")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z_0-9]+)` \|", section, re.MULTILINE)) == {str(reason) for reason in Reason}


def test_every_way_of_breaking_a_load_is_told():
    text = (ROOT / "tests/chaos/README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(SCENARIOS)


def test_the_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"run", "test"} <= named
    assert named <= targets


def test_the_files_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_of_the_code_has_each_module_of_the_engine_from_the_ground_up():
    section = README.split("## The code")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(engine/.*?)`: (.*?) \|", section, re.MULTILINE)
    told = {folder.strip("/").replace("/", "."): re.findall(r"(\w+)\.py", names) for folder, names in rows}
    assert list(told) == [name for name in FLOORS if name.startswith("engine")]
    assert sorted(f"{folder}.{name}" for folder, names in told.items() for name in names) == sorted(modules("engine"))


def test_every_type_of_problem_is_told():
    section = README.split("<!-- problems -->")[1].split("\n### ")[0]
    told = {
        name for first in re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", first)
    }
    calls = [
        node
        for path in (ROOT / "api").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Problem"
    ]
    literal = {call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)}
    # Also the engine's errors that can become an answer, and Falcon's; but not the one that no client is left to read.
    answered = {
        e.code
        for e in (Transient, WrongClock, TokenExpired, AccessDenied, NotFound, Conflict, Refused, KeyReused, Permanent)
    }
    assert told == (literal | answered | {"method_not_allowed", "bad_request"}) - {"client_gone"}
