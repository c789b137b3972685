"""An import tool that does not work costs only its own row of the report, whatever is wrong with it. No servers."""

import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from bench import importer
from tests.running import alive, until


@pytest.fixture
def tool(tmp_path):
    def make(content, mode=0o755):
        path = tmp_path / "tool"
        path.write_text(content)
        path.chmod(mode)
        return str(path)

    return make


@pytest.mark.parametrize(
    ("content", "mode"), [("#!/nowhere/sh\n", 0o755), ("no program\n", 0o755), ("#!/bin/sh\n", 0o644)]
)
def test_a_tool_that_cannot_be_executed_is_not_tried(tool, content, mode):
    path = tool(content, mode)
    workers, why = importer.look(path)
    assert workers == ()
    assert path in why


def test_a_tool_that_hangs_is_not_waited_for(tool, monkeypatch):
    monkeypatch.setattr(importer, "LOOK_SECONDS", 0.2)
    path = tool("#!/bin/sh\nexec sleep 60\n")
    assert importer.look(path) == ((), f"{path} did not end within 0.2 seconds")


def test_what_a_tool_that_hangs_has_started_ends_with_it(tool, tmp_path, monkeypatch):
    path = tool(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/pid\nwait\n")
    for seconds in (1, 5, 30):  # until it gets that far
        monkeypatch.setattr(importer, "LOOK_SECONDS", seconds)
        assert importer.look(path)[0] == ()
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
    child = int((tmp_path / "pid").read_text())
    until(lambda: not alive(child))


def test_the_best_number_of_workers_is_the_quickest_at_the_median(monkeypatch):
    taken = iter([99, 3, 2, 4, 5, 4, 2, 9, 6, 2, 2, 3, 1])
    asked = []
    monkeypatch.setattr(
        importer, "run", lambda rig, tool, path, workers, lines: (asked.append(workers), next(taken))[1]
    )
    assert importer.best(None, "tool", Path("file"), (1, 2, 4, 8), 10) == 2
    assert asked == [8, *(1, 2, 4, 8) * 3]


def test_a_number_of_workers_with_which_the_tool_fails_is_passed_over(monkeypatch, capsys):
    asked = []

    def run(rig, tool, path, workers, lines):
        asked.append(workers)
        if workers == 1:
            raise RuntimeError("tool did not end within 600 seconds")
        return workers

    monkeypatch.setattr(importer, "run", run)
    assert importer.best(None, "tool", Path("file"), (1, 2, 4), 10) == 2
    assert asked == [4, 1, 2, 4, 2, 4, 2, 4]
    assert capsys.readouterr().err == "import tool: tool did not end within 600 seconds\n"


def test_a_tool_that_fails_with_every_number_of_workers_is_told_of(monkeypatch):
    monkeypatch.setattr(importer, "run", lambda *given: (_ for _ in ()).throw(RuntimeError(f"-j{given[3]} failed")))
    with pytest.raises(RuntimeError, match="-j8 failed"):
        importer.best(None, "tool", Path("file"), (1, 2, 4, 8), 10)


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("connected\\nFailed: cannot write\\n0 document(s) imported", "Failed: cannot write"),
        ("connected\\n0 document(s) imported", "0 document(s) imported"),
        ("", "no words"),
    ],
)
def test_why_the_tool_failed_is_told_in_its_own_words(tool, says, told):
    rig = MagicMock()
    rig.store.data.__getitem__.return_value.count_documents.return_value = 0
    with pytest.raises(RuntimeError, match=re.escape(f"-j2 ended with 1 and 0 of 5 documents: {told}")):
        importer.run(rig, tool(f"#!/bin/sh\nprintf '{says}' >&2\nexit 1\n"), Path("file"), 2, 5)


def test_a_tool_that_runs_is_tried_and_named(tool):
    assert importer.look(tool("#!/bin/sh\necho tool version: 1.2\n")) == (importer.WORKERS, "tool 1.2")
    assert importer.look(None) == ((), "MONGOIMPORT names no tool")
