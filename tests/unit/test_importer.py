"""A tool that is no good costs its own row of the report, whatever is wrong with it."""

import pytest

from bench import importer


@pytest.fixture
def tool(tmp_path):
    def make(content, mode=0o755):
        path = tmp_path / "tool"
        path.write_text(content)
        path.chmod(mode)
        return str(path)

    return make


def test_a_tool_that_cannot_be_executed_is_not_tried(tool):
    for path in (tool("#!/nowhere/sh\n"), tool("no program\n"), tool("#!/bin/sh\n", 0o644)):
        workers, why = importer.look(path)
        assert workers == ()
        assert path in why


def test_a_tool_that_hangs_is_not_waited_for(tool, monkeypatch):
    monkeypatch.setattr(importer, "LOOK_SECONDS", 0.2)
    path = tool("#!/bin/sh\nexec sleep 60\n")
    assert importer.look(path) == ((), f"{path} did not end within 0.2 seconds")


def test_a_tool_that_runs_is_tried_and_named(tool):
    assert importer.look(tool("#!/bin/sh\necho tool version: 1.2\n")) == (importer.WORKERS, "tool 1.2")
    assert importer.look(None) == ((), "MONGOIMPORT names no tool")
