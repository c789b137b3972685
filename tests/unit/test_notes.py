"""What is noted about files survives, or its loss does no harm; one process at a time is at work on a file."""

import threading
from unittest.mock import Mock

import pytest

from api.commands import notes as module
from api.commands.notes import Note, alone

OPTIONS, OTHERS = {"collection": "a"}, {"collection": "b"}


def test_only_one_process_at_a_time_is_at_work_on_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    waiting, order = threading.Event(), []

    def second():
        with alone("http://api", "f", waiting.set):
            order.append("second")

    other = threading.Thread(target=second)
    with alone("http://api", "f", lambda: order.append("nobody to wait for")), alone("http://api", "g", waiting.set):
        assert not waiting.is_set()
        other.start()
        assert waiting.wait(30)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]


def test_a_note_survives_a_disk_that_is_full(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    note = Note("http://api", "f", [1])
    note.put(key="k")
    assert (note.kept, module.why_not_kept()) == (True, None)
    monkeypatch.setattr(module.Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device")))
    note.put(asked="a")
    assert (note.kept, Note("http://api", "f", [1]).get("key")) == (False, "k")


def test_a_user_without_a_home_has_nowhere_to_resume_from_and_loads_all_the_same(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(module.Path, "home", Mock(side_effect=RuntimeError("no home")))
    module.forget_old()
    note = Note("http://api", "f", [1])
    note.put(key="k")
    assert (note.get("key"), Note("http://api", "f", [1]).get("key")) == ("k", None)
    assert "cannot be written to" in module.why_not_kept()
    with alone("http://api", "f", Mock()):
        assert not note.kept


def test_a_ticket_is_that_of_its_options_until_the_command_is_done(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def note():
        return Note("http://api", "f", [1])

    first, again = note().ticket(OPTIONS)
    others, _ = note().ticket(OTHERS)
    assert (again, first != others) == (False, True)
    assert note().ticket(OPTIONS) == (first, True)
    mine = note()
    mine.ticket(OPTIONS)
    mine.done(OPTIONS)
    assert note().ticket(OTHERS) == (others, True)  # an interrupted command with other options
    assert note().ticket(OPTIONS, waited=True) == (first, True)  # it waited for the command that has just ended
    second, again = note().ticket(OPTIONS)
    assert (second != first, again) == (True, False)
    third, again = note().ticket(OPTIONS, anew=True)
    assert (third != second, again) == (True, False)
    mine.done(OPTIONS)  # late: another command has submitted another job since
    assert note().ticket(OPTIONS) == (third, True)


def test_the_end_of_a_command_costs_nothing_that_another_has_noted_since(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = Note("http://api", "f", [1])
    before.ticket(OPTIONS)
    Note("http://api", "f", [2]).put(key="of the next version")
    before.done(OPTIONS)
    assert Note("http://api", "f", [2]).get("key") == "of the next version"
    now = Note("http://api", "f", [2])
    ticket, _ = now.ticket(OPTIONS)
    with alone("http://api", "f", Mock()):
        now.done(OPTIONS)  # another command is at work on the file, and goes by what is noted
    assert Note("http://api", "f", [2]).ticket(OPTIONS) == (ticket, True)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"5", b'{"stamp":[1],"jobs":5}', b'{"stamp":[1],"jobs":{"h":5}}', b'{"stamp":5}']
)
def test_a_note_that_cannot_be_read_is_none(monkeypatch, tmp_path, content):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    Note("http://api", "f", [1]).put(key="k")
    [file] = tmp_path.glob("headrace/loads/*")
    file.write_bytes(content)
    note = Note("http://api", "f", [1])
    assert (note.get("key"), note.kept, note.ticket(OPTIONS)[1]) == (None, False, False)
