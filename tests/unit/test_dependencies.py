"""Every package that the program imports at run time is a dependency of the project, and every dependency is pinned."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-") for requirement in requirements}


def imported(tree):
    """The top-level packages that a module imports at run time: not those under `if TYPE_CHECKING`."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        found |= imported(node)
    return found


def test_what_is_imported_where_it_runs_is_installed_with_it():
    owners = packages_distributions()
    declared = names(PROJECT["dependencies"])
    missing = {
        f"{path.name}: {package}"
        for folder in ("engine", "api")
        for path in (ROOT / folder).rglob("*.py")
        for package in imported(ast.parse(path.read_text())) - set(sys.stdlib_module_names) - {"engine", "api"}
        if not names(owners.get(package, ["nobody"])) & declared
    }
    assert missing == set()


def test_every_dependency_is_pinned_by_the_constraints():
    pinned = names(line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"].values()
    assert names(PROJECT["dependencies"]) | {name for extra in extras for name in names(extra)} <= pinned
