"""What the commands that call the API print of its answers. No servers."""

from types import SimpleNamespace

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from api.commands import remote as module
from tests.answering import client_of


@pytest.fixture
def run(monkeypatch):
    """Run a command with an API that has no worker; returns its result."""

    def answer(request):
        return httpx.Response(200, headers={"X-Request-ID": "r"}, json={"workers": []})

    monkeypatch.setattr(module, "_client", lambda url: client_of(answer))
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(module.remote, arguments)


@pytest.mark.parametrize("arguments", [["top", "--once"], ["profile", "--seconds", "0"]])
def test_where_no_worker_is_alive_that_is_told(run, arguments):
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "headrace: no worker is alive: start `headrace engine`\n"
    told = run(*arguments, "--json")
    assert (told.exit_code, told.stdout, told.stderr) == (0, '{"workers":[]}\n', "")


def test_who_watches_while_no_worker_is_alive_is_told_that(run, monkeypatch):
    monkeypatch.setattr(module, "console", lambda: Console(force_terminal=True, width=100))
    monkeypatch.setattr(module, "is_live", lambda console: True)

    def sleep(seconds):
        raise KeyboardInterrupt

    # Only this module's: threads that other tests have started sleep, too.
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    done = run("top")
    assert done.exit_code == 0
    assert "no worker is alive: start `headrace engine`" in done.stdout


@pytest.mark.parametrize("seconds", ["-1", "1", "3601", "nan"])
def test_the_help_tells_how_long_a_profile_may_take(run, seconds):
    allowed = "2 to 3600 seconds"
    done = run("profile", "--seconds", seconds)
    assert (done.exit_code, allowed in done.stderr) == (2, True)
    shown = run("profile", "--help").stdout
    assert f"{allowed}; 0: since they started" in shown
    assert "0<=x" not in shown
