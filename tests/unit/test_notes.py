"""What is noted about files survives, or its loss does no harm; one process at a time is at work on a file."""

import threading
from unittest.mock import Mock

from api.commands import notes as module
from api.commands.notes import Note, alone


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
