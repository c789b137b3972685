"""`headrace up` while it waits for its parts: each reason is shown once, and the wait has an end. No servers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from api.client import local_url
from api.commands import up
from engine.errors import StartError
from engine.settings import Settings


@pytest.fixture
def wait(monkeypatch, capsys):
    """Wait until there are no `reasons` left, each shown without delay; returns the printed lines."""
    monkeypatch.setattr(up, "QUIET_SECONDS", 0)
    monkeypatch.setattr(up.time, "sleep", lambda seconds: None)

    def run(reasons, children=None, died=None):
        client = SimpleNamespace(not_ready=lambda: next(reasons, None))
        children = children or [SimpleNamespace(check=lambda: None, log=Path("api.log"))]
        up._wait_ready(Console(soft_wrap=True), client, up._Parts(SimpleNamespace(died=lambda: died), children))
        return capsys.readouterr().out.splitlines()

    return run


def test_each_reason_is_told_once(wait):
    said = wait(iter(["S3 is away", "S3 is away", "MongoDB is away", "MongoDB is away"]))
    assert said == ["Not ready yet: S3 is away", "Not ready yet: MongoDB is away"]


def test_a_start_of_a_few_seconds_tells_none(wait, monkeypatch):
    monkeypatch.setattr(up, "QUIET_SECONDS", 60)
    assert wait(iter(["S3 is away"])) == []


def test_the_wait_ends_with_the_last_reason(wait, monkeypatch):
    monkeypatch.setattr(up, "READY_SECONDS", 0)
    with pytest.raises(StartError, match=r"not ready within 0 seconds: S3 is away \(log: api\.log\)"):
        wait(iter(lambda: "S3 is away", None))


def test_a_part_that_has_ended_ends_the_wait(wait):
    with pytest.raises(StartError, match="mongod has ended"):
        wait(iter(lambda: "S3 is away", None), died="mongod has ended")


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("[::1]", "[::1]"), ("box", "box")],
)
def test_an_api_is_called_where_it_listens(host, url):
    assert local_url(Settings.model_construct(api_host=host, port=3000)) == f"http://{url}:3000"


def test_what_a_file_says_does_nothing_to_the_terminal_and_is_shown_as_it_is(monkeypatch, capsys):
    shown = "\x1b[2J:smile:\u009b[bold]"
    progress = dict.fromkeys(("lines", "inserted", "duplicates", "rejected", "blank", "recordsPerSecond"), 1)
    reject = {"offset": 0, "reason": "duplicate_key", "detail": f"E11000 {shown}"}
    status = {"status": "FAILED", "progress": progress, "error": {"message": shown}, "errors": [reject]}
    monkeypatch.setattr(up, "_show_documents", lambda *what: None)
    up._summary(Settings.model_construct(), {}, status, up._console())
    said = capsys.readouterr().out
    assert "Error: \\x1b[2J:smile:\\x9b[bold]\n" in said
    assert "duplicate_key: E11000 \\x1b[2J:smile:\\x9b[bold]\n" in said
