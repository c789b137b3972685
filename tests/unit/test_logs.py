"""Logs: four fields of context on every JSON line, secrets masked, control characters escaped, full pipes survived."""

import fcntl
import io
import json
import logging
import os
import signal
import sys

import pytest
import structlog

from engine.logs import _Output, configure, get_logger, mask


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    configure.__globals__["_secrets"].clear()


def test_every_line_is_json_that_carries_action_job_range_and_worker(capsys):
    configure("info", "json")
    get_logger().info("ready", action="boot", worker="h:1")
    logging.getLogger("somebody.else").warning("odd %s", "thing")
    ours, theirs = map(json.loads, capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["action"], ours["worker"], ours["job"], ours["range"]) == (
        "ready",
        "boot",
        "h:1",
        None,
        None,
    )
    assert theirs["event"] == "odd thing"
    assert {"action", "job", "range", "worker"} <= set(theirs)


def test_secrets_are_masked_wherever_they_stand(capsys):
    configure("info", "json", ["hunter2", "mongodb://me:hunter2@h/d"])
    log = get_logger()
    log.info("password hunter2", action="x", uri="mongodb://me:hunter2@h/d", nested={"a": ["hunter2"]})
    log.info("another", action="x", uri="https://user:other@host/")
    try:
        raise ValueError("hunter2")
    except ValueError:
        log.exception("failed", action="x")
    said = capsys.readouterr().err
    assert "hunter2" not in said
    assert "other@" not in said
    assert len(said.splitlines()) == 3


class Odd:
    def __repr__(self):
        return "<hunter2>"


def test_secrets_are_masked_in_whatever_is_no_text(capsys):
    configure("info", "json", ["hunter2", 'quo"ted'])
    log = get_logger()
    log.info("odd", action="x", error=ValueError("hunter2"), data=b"hunter2", thing=Odd(), more=[Odd()], key={1: Odd()})
    log.info("odd", action="x", error=ValueError('quo"ted'), count=3, share=0.5, sure=True)
    said = capsys.readouterr().err
    assert "hunter2" not in said
    assert "ted" not in said.replace("started", "")
    assert json.loads(said.splitlines()[1])["count"] == 3


def test_a_password_that_should_have_been_quoted_is_masked_to_its_end():
    assert mask("at mongodb://me:p/w@ss@h:1/d, or") == "at mongodb://***@h:1/d, or"
    assert mask("http://h/a?mail=x@y") == "http://h/a?mail=x@y"


def test_text_is_readable_and_leaves_out_what_is_not_known(capsys):
    configure("info", "text")
    get_logger().info("ready", action="boot")
    said = capsys.readouterr().err
    assert "ready" in said
    assert "job" not in said


def test_mask_hides_the_credentials_of_any_uri():
    assert mask("see mongodb+srv://a:b@h/x for it") == "see mongodb+srv://***@h/x for it"


def test_a_line_that_a_full_pipe_cut_spoils_no_other(monkeypatch):
    read, write = os.pipe()
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    monkeypatch.setattr("engine.logs.FULL_SECONDS", 0.01)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        output = _Output()
        output.write("a" * 2 * size + "\n")
        output.write("dropped\n")
        assert os.read(read, 2 * size) == b"a" * size
        output.write("whole\n")
        assert os.read(read, size) == b"\nwhole\n"
        output.write("next\n")
        assert os.read(read, size) == b"next\n"
        os.close(output._pipe)
    os.close(read)


@pytest.mark.parametrize("before", [set(), {signal.SIGTTOU, signal.SIGHUP}])
def test_a_line_written_from_the_background_is_not_answered_with_a_signal(monkeypatch, before):
    """Otherwise, on a terminal with `tostop`, the supervisor, which handles TTOU, would retry the write for ever."""
    held = []

    class Terminal(io.StringIO):
        def write(self, text):
            held.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Terminal())
    unchanged = signal.pthread_sigmask(signal.SIG_BLOCK, before)
    try:
        _Output().write("line\n")
        assert signal.SIGTTOU in held[0]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == unchanged | before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unchanged)


def test_what_a_client_asked_for_is_shown_and_not_obeyed(capsys):
    configure("info", "text")
    get_logger().info("answered", action="request", path="/a\x1b]0;b\x07\u202ec")
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        get_logger().exception("unexpected error", action="crash")
    said = capsys.readouterr().err
    assert r"/a\x1b]0;b\x07\u202ec" in said
    assert not set(said) & set("\x1b\x07\u202e")
    assert len([line for line in said.splitlines() if "ValueError" in line]) == 2  # a traceback keeps its lines


def test_a_long_text_is_masked_in_one_pass():
    text = "a." * 1_000_000  # a scan to its end from each word would take hours
    assert mask(f"{text} redis://me:secret@h") == f"{text} redis://***@h"
