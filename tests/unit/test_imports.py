"""Imports run downwards only, and take what is offered."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

FLOORS = (
    ("engine.model", "engine.cores", "engine.values"),
    ("engine.errors",),
    (
        "engine.settings",
        "engine.logs",
        "engine.sample",
        "engine.budget",
        "engine.ranges",
        "engine.lines",
        "engine.watermark",
        "engine.heartbeat",
        "engine.steps",
        "engine.ports",
        "engine.children",
        "engine.schema",
        "engine.waits",
        "engine.memory",
        "engine.replies",
    ),
    ("engine.batches",),
    ("engine.decode",),
    ("engine.store", "engine.s3", "engine.formats"),
    ("engine.parts", "engine.jobs"),
    ("engine.objects",),
    ("engine.direct",),
    ("engine.ledger", "engine.stats", "engine.admission", "engine.wakeups"),
    ("engine.rejects", "engine.sink", "engine.job_batches", "engine.retention", "engine.loads"),
    ("engine.openjobs",),
    ("engine.queue", "engine.sources"),
    ("engine.plans", "engine.dryrun", "engine.history"),
    ("engine.planner",),
    ("engine.run", "engine.window"),
    ("engine.keeper", "engine.lookout"),
    ("engine.retries",),
    ("engine.reading",),
    ("engine.pipeline",),
    ("engine.chooser", "engine.upkeep"),
    ("engine.worker",),
    ("engine.embedded",),
    ("engine.supervisor", "engine.local"),
    ("api.problems", "api.answers", "api.models", "api.client"),
    ("api.operations", "api.views"),
    ("api.limits",),
    ("api.auth", "api.openapi", "api.metrics", "api.queue", "api.health", "api.uploads", "api.submit", "api.watch"),
    ("api.jobs", "api.files", "api.direct", "api.door"),
    ("api.app",),
    ("api.server",),
    ("api.commands.terminal", "api.commands.transfer", "api.commands.show"),
    ("api.commands.up", "api.commands.doctor", "api.commands.loader"),
    ("api.commands.remote",),
    ("api.commands.main",),
    ("api.cli",),
)


def modules(*packages: str) -> dict[str, Path]:
    found = {}
    for package in packages or ("engine", "api"):
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
    return {name for name in names if name in modules()}


def test_every_module_stands_on_a_floor():
    assert set(modules()) == {name for floor in FLOORS for name in floor}


def test_a_module_imports_from_lower_floors_only():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if floor_of[other] >= floor_of[name]
    ]
    assert upward == []


def test_the_engine_reads_no_clock_that_somebody_sets():
    """Times are the database server's, and what is waited for is measured by the clock that nobody sets."""
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
    """What `__all__` of a module names."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


def test_a_name_that_is_imported_is_in_all_of_its_module():
    everything = modules("engine", "api", "bench")
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
