"""Modules import downwards, never in a circle, and only names in `__all__`; the engine does not read the wall clock."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# From the bottom up. A module belongs to the last of these names that its own begins with.
FLOORS = (
    "engine",
    "engine.text",
    "engine.control",
    "engine.s3",
    "engine.load",
    "engine.fleet",
    "engine.local",
    "api",
    "api.commands",
    "api.cli",
    "bench",
)


def modules(*packages: str) -> dict[str, Path]:
    found = {}
    for package in packages or ("engine", "api", "bench"):
        for path in (ROOT / package).rglob("*.py"):
            if path.stem != "__init__":
                found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & set(modules())


def floor(module: str) -> int:
    return max(number for number, name in enumerate(FLOORS) if f"{module}.".startswith(f"{name}."))


def test_every_folder_of_modules_is_a_floor():
    alone = {"api.cli"}  # a module above the folders that it puts together
    assert {name.rpartition(".")[0] for name in modules()} == set(FLOORS) - alone


def test_a_module_imports_from_its_own_floor_and_lower_ones_only():
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if floor(other) > floor(name)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    """Not even in a long one: every module can be read, and tested, after those that it imports."""
    imports = TopologicalSorter({name: imported(path) for name, path in modules().items()})
    assert set(imports.static_order()) == set(modules())


def test_the_engine_reads_no_clock_that_somebody_sets():
    """Timestamps are the database server's, and durations are measured with the monotonic clock."""
    reads = {"time", "time_ns", "gmtime", "localtime", "now", "utcnow", "today"}
    found = [
        f"{name}: {ast.unparse(node)}"
        for name, path in modules("engine").items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in reads
        if isinstance(node.value, ast.Name) and node.value.id in ("time", "datetime", "date")
    ]
    assert found == []


def exported(path: Path) -> set[str]:
    """The names in a module's `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


def test_a_name_that_is_imported_is_in_all_of_its_module():
    everything = modules()
    offered = {name: exported(path) for name, path in everything.items()}
    hidden = [
        f"{name} imports {alias.name} of {node.module}"
        for name, path in everything.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module in offered
        for alias in node.names
        if alias.name not in offered[node.module]
    ]
    assert hidden == []
