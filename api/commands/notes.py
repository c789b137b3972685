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
def _lock_of(url: str, name: str) -> Iterator[IO[bytes] | None]:
    """The file that is locked while a command is at work on a file; None where nothing can be kept."""
    lock: IO[bytes] | None = None
    with suppress(OSError):
        place = _place(url, name).with_suffix(".lock")
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.open("wb")
    if lock is None:
        yield None
        return
    with lock:
        yield lock


def _locked(lock: IO[bytes] | None, *, wait: bool) -> bool:
    """Lock it, until it is closed; returns False if another command has, and this one is not to wait."""
    if lock is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # this file system has no locks
    return True


@contextmanager
def alone(url: str, name: str, waiting: Callable[[], None]) -> Iterator[bool]:
    """A context that only one command at a time enters for a file: two that sent it at once would load two copies.

    `waiting` is called if another command is in it. Yields whether that was so. Where nothing can be kept, nobody waits.
    """
    with _lock_of(url, name) as lock:
        if waited := not _locked(lock, wait=False):
            waiting()
            _locked(lock, wait=True)
        yield waited


class Note:
    """What earlier commands noted about a file: `uploadId` while it is sent, then `key` and `etag` of its object; and by
    the options of a job, the ticket that it was submitted with, and whether the command that did so is unfinished.

    Args:
        url: the URL of the API.
        name: the file's full path, or the object's s3:// URL.
        stamp: identifies the version of the file: a note with another stamp is ignored.
    """

    def __init__(self, url: str, name: str, stamp: list[Any]) -> None:
        self._url = url
        self._name = name
        self._file = _place(url, name)
        self._stamp = stamp
        known = self._known()
        self.kept = known is not None
        """Whether what is noted was written, so that the next command will know it."""
        self._state: dict[str, Any] = known or {"stamp": stamp, "jobs": {}}

    def _known(self) -> dict[str, Any] | None:
        """What is noted about this version of the file; None if there is nothing."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            known = orjson.loads(self._file.read_bytes())
            jobs = dict(known.get("jobs", {}))  # notes of earlier versions have none
            if known["stamp"] == self._stamp and all(isinstance(ticket, str) for ticket, _ in jobs.values()):
                return {**known, "jobs": jobs}
        return None

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

    def ticket(self, options: dict[str, Any], *, waited: bool = False, anew: bool = False) -> tuple[str, bool]:
        """The idempotency key for a job with these options, and whether an earlier command has used it.

        It is that of the last command if this is unfinished, or has finished while this one `waited` for it; else, or if
        `anew`, a new one, which is noted.
        """
        of = _hash(options)
        ticket, unfinished = self._state["jobs"].get(of, ("", False))
        if ticket and (unfinished or waited) and not anew:
            return ticket, True
        ticket = secrets.token_hex(32)
        self._state["jobs"][of] = ticket, True
        self.put()
        return ticket, False

    def done(self, options: dict[str, Any]) -> None:
        """The command has finished: the next one with these options submits a job of its own, for the same object."""
        of = _hash(options)
        with _lock_of(self._url, self._name) as lock:
            # What another command has noted since must not be lost. If one is at work now, this counts as unfinished.
            if not _locked(lock, wait=False) or (known := self._known()) is None:
                return
            ticket, unfinished = known["jobs"].get(of, ("", False))
            if unfinished and ticket == self._state["jobs"].get(of, ("",))[0]:
                known["jobs"][of] = ticket, False
                self._state = known
                self.put()

    def forget(self) -> None:
        """What was uploaded is gone: the next command uploads the file again, for a job of its own."""
        self._state = {"stamp": self._stamp, "jobs": {}}
        with suppress(OSError):
            self._file.unlink(missing_ok=True)


def _hash(options: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(options, option=orjson.OPT_SORT_KEYS)).hexdigest()
