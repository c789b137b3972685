"""One embedded server: a child process with its log, waiting until it is up, why it ended, and stopping it."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from engine.children import before_exec, exit_code, signal_name
from engine.errors import StartError

__all__ = ["SOCKET_FOLDER", "PortTaken", "Server"]

START_SECONDS: Final = 60.0
"""How long a server may take to answer after its start; on an idle machine it takes about one second."""

STOP_SECONDS: Final = 8.0
"""How long a server may take to end after TERM before it is killed."""

SOCKET_FOLDER: Final = Path("/tmp")  # noqa: S108 (fixed by SeaweedFS)
"""Folder in which SeaweedFS creates a socket for each of its ports."""


class PortTaken(StartError):
    """The server ended because its port was taken before it could listen."""


class Server:
    """A child process that runs in the folder of its log. `environment` is added to this process's; `sockets` are
    patterns of the files that it leaves in `SOCKET_FOLDER`."""

    def __init__(
        self,
        name: str,
        command: list[str],
        log: Path,
        environment: dict[str, str] | None,
        sockets: Sequence[str],
    ) -> None:
        self.name = name
        self.log = log
        self._sockets = sockets
        with log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    command,
                    cwd=log.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=before_exec,  # noqa: PLW1509 (other threads hold no lock at this point)
                    env=os.environ | (environment or {}),
                )
            except OSError as error:
                raise StartError(f"{name} cannot be started from {command[0]}: {error.strerror}") from None

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Wait until `answers`. Raises StartError if the server ends or is too slow, PortTaken if its port is taken."""
        deadline = time.monotonic() + START_SECONDS
        while not answers():
            if exit_code(self.process) is not None:
                log = self.log.read_text(errors="replace").lower()
                # The second is SeaweedFS's message for a taken port, the third for a socket that another user owns.
                taken = any(words in log for words in ("address already in use", "cannot be used", "failed to remove"))
                raise (PortTaken if taken else StartError)(self.why())
            if time.monotonic() > deadline:
                raise StartError(
                    f"{self.name} did not start within {START_SECONDS:g} seconds; its last log line: "
                    f"{self._last_words()} (the whole log: {self.log})"
                )
            time.sleep(0.05)

    def _last_words(self) -> str:
        """Its last complaint; mongod's log is JSON, whose severity E is an error and F is fatal."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines):
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["s"] in ("E", "F") and "aborting after" not in entry["msg"]:
                    more = entry.get("attr", {})
                    why = more.get("error") or more.get("reason") or more.get("message") or more.get("msg") or ""
                    return f"{entry['msg']}{': ' if why else ''}{why}"[:300]
        return lines[-1][:300] if lines else "none"

    def why(self) -> str:
        """A sentence on why it ended."""
        log = self.log.read_text(errors="replace")
        for line in log.splitlines():
            if "error while loading shared libraries" in line:
                library = line.split("libraries:", 1)[1].split(":", 1)[0].strip()
                hint = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3"}.get(library)
                mend = f"sudo apt-get install {hint}" if hint else "install the package that has it"
                return f"{self.name} needs the library {library}, which this machine lacks: {mend}"
            if "No space left on device" in line:
                return f"{self.name} has no space left on the disk of {self.log.parent}: free some (log: {self.log})"
        code = exit_code(self.process) or 0
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return f"{self.name} {how}; its last log line: {self._last_words()} (log: {self.log})"

    def stop(self) -> None:
        """Stop it with TERM, then KILL; returns when it is gone, with its sockets removed."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        for pattern in self._sockets:
            for socket in SOCKET_FOLDER.glob(pattern):
                with suppress(OSError):  # already gone, or another user's
                    socket.unlink()
