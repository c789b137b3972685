"""The targets of the Makefile, and what they say when they cannot run; without servers."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.running import ROOT


@pytest.fixture
def folder(tmp_path):
    """A folder with only the files that make reads."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_hands_on_the_name_of_a_file_as_it_is(folder):
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text('#!/bin/sh\n[ "$1 $2" = "-m api.cli" ] && shift 2 && printf "<%s>" "$@"\nexit 0\n')
    (tools / "python").chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    name = 'it\'s [x] "mine".ndjson'
    make = ["make", "--no-print-directory", "run"]  # within another make, it would print the folders it enters
    made = subprocess.run([*make, f"FILE={name}", "ONCE=1"], cwd=folder, capture_output=True, text=True)
    assert made.stdout == f"<up><--records><200000><--file><{name}><--once>"
    made = subprocess.run([*make, "RECORDS=7", "ONCE=0"], cwd=folder, capture_output=True, text=True)
    assert made.stdout == "<up><--records><7>"


def test_make_says_what_to_install_where_python_has_no_venv_module(folder):
    fake = folder / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    made = subprocess.run(["make", "install", f"PYTHON={fake}"], cwd=folder, capture_output=True, text=True)
    assert made.returncode != 0
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert f"has no venv module: sudo apt-get install {package}" in made.stderr
    assert not (folder / ".venv").exists()


def test_make_help_lists_every_target_with_a_line():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [target for target in targets if not re.search(rf"make {target} +\w", listed)] == []


@pytest.mark.parametrize("python", ["exit 1", "exit 127"])
def test_an_environment_that_is_of_no_use_is_told(folder, python):
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(f"#!/bin/sh\n{python}\n")
    (tools / "python").chmod(0o755)
    made = subprocess.run(["make", "install"], cwd=folder, capture_output=True, text=True)
    assert made.returncode != 0
    assert "run make clean" in made.stderr
