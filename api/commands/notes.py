"""What is noted about each file in the user's state folder, so that nothing is uploaded or loaded twice.

The same command resumes where the last one stopped, and loads the object that is already in S3 if the file has not
changed since.
"""

import fcntl
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import orjson

__all__ = ["Note", "alone", "forget_old", "why_not_kept"]

KEEP_SECONDS: Final = 30 * 24 * 3600.0
"""How long the note of a file that is not loaded again is kept."""


def _folder() -> Path:
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not given.is_absolute():  # a relative path counts as unset
        try:
            given = Path.home() / ".local" / "state"
        except RuntimeError:  # HOME is not set, and the system does not know the user
            given = Path(os.devnull)  # where nothing can be kept
    return given / "headrace" / "loads"


def _place(url: str, name: str) -> Path:
    """Where the note of a file, by its full path or its s3:// URL, for the API at `url` is kept."""
    return _folder() / hashlib.sha256(f"{url}\n".encode() + os.fsencode(name)).hexdigest()


def why_not_kept() -> str | None:
    """Why no notes can be kept; None if they can."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b".")
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror})"
    return None


def forget_old() -> None:
    """Delete the notes of files that have not been loaded for `KEEP_SECONDS`."""
    with suppress(OSError):
        for note in _folder().iterdir():
            with suppress(OSError):
                if time.time() - note.stat().st_mtime > KEEP_SECONDS:
                    note.unlink()


@contextmanager
def alone(url: str, name: str, waiting: Callable[[], None]) -> Iterator[None]:
    """A context that only one process at a time enters for a file: two that sent it at once would load two copies.

    `waiting` is called if another process is in it. Where nothing can be kept, nobody waits.
    """
    lock: IO[bytes] | None = None
    with suppress(OSError):
        place = _place(url, name).with_suffix(".lock")
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.open("wb")
    if lock is None:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # this file system has no locks
        yield


class Note:
    """What earlier commands noted about a file: `uploadId` while it is sent, then `key` and `etag` of its object; a
    `ticket`, from which idempotency keys are derived, and the key last `asked` with.

    Args:
        url: the URL of the API.
        name: the file's full path, or the object's s3:// URL.
        stamp: identifies the version of the file: a note with another stamp is ignored.
    """

    def __init__(self, url: str, name: str, stamp: list[Any]) -> None:
        self._file = _place(url, name)
        self.kept = False
        """Whether what is noted was written, so that the next command will know it."""
        self._state: dict[str, Any] = {"stamp": stamp, "ticket": secrets.token_hex(16)}
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = orjson.loads(self._file.read_bytes())
            if known["stamp"] == stamp and isinstance(known["ticket"], str):
                self._state, self.kept = known, True

    def get(self, name: str) -> str | None:
        """A noted value; None if there is none."""
        found = self._state.get(name)
        return found if isinstance(found, str) else None

    def put(self, **known: str) -> None:
        """Note these values. If they cannot be written, the load merely cannot be resumed."""
        self._state |= known
        self.kept = False
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(".part")
            part.write_bytes(orjson.dumps(self._state))
            part.replace(self._file)  # a disk that fills up must not cost what was noted before
            self.kept = True

    def stored(self, made: dict[str, Any]) -> str:
        """Note the key and ETag of the file's object from the API's answer; returns the key."""
        self.put(key=made["fileKey"], etag=made["etag"])
        return str(made["fileKey"])

    def ticket(self, options: dict[str, Any]) -> str:
        """The idempotency key for these options: the same for the same file until `done` or `forget`."""
        whole = orjson.dumps([self._state["ticket"], options], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(whole).hexdigest()

    def done(self) -> None:
        """The command has finished: the next one submits a job of its own, for the same object."""
        self.put(ticket=secrets.token_hex(16))

    def forget(self) -> None:
        """What was uploaded is gone: the next command uploads the file again, for a job of its own."""
        self._state = {"stamp": self._state["stamp"], "ticket": secrets.token_hex(16)}
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
