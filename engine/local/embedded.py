"""One embedded server: a child process with its log, whether it has come up, what it died of, and its end."""

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
"""How long a server may take until it answers; it takes about one second on an idle machine."""

STOP_SECONDS: Final = 8.0

SOCKET_FOLDER: Final = Path("/tmp")  # noqa: S108 (fixed by SeaweedFS)
"""Where SeaweedFS makes a socket beside each of its ports."""


class PortTaken(StartError):
    """The server ended since its port was taken before it could listen."""


class Server:
    """One child process, which runs in the folder of its log, and its end; `sockets` are patterns of what it leaves in
    SOCKET_FOLDER."""

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
                    preexec_fn=before_exec,  # noqa: PLW1509 (what threads there are hold no lock)
                    env=os.environ | (environment or {}),
                )
            except OSError as error:
                raise StartError(f"{name} cannot be started from {command[0]}: {error.strerror}") from None

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Raises StartError when the server ends, or does not answer in time; PortTaken where another port would help."""
        deadline = time.monotonic() + START_SECONDS
        while not answers():
            if exit_code(self.process) is not None:
                log = self.log.read_text(errors="replace").lower()
                # The second is what SeaweedFS says of one, and the third of a socket of another user's.
                taken = any(words in log for words in ("address already in use", "cannot be used", "failed to remove"))
                raise (PortTaken if taken else StartError)(self.why())
            if time.monotonic() > deadline:
                raise StartError(
                    f"{self.name} did not come up within {START_SECONDS:g} seconds; its last words: {self._last_words()} "
                    f"(the whole log: {self.log})"
                )
            time.sleep(0.05)

    def _last_words(self) -> str:
        """What it complained of last; mongod's log is JSON, of which E and F are the severe lines."""
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
        """Why it ended."""
        log = self.log.read_text(errors="replace")
        for line in log.splitlines():
            if "error while loading shared libraries" in line:
                library = line.split("libraries:", 1)[1].split(":", 1)[0].strip()
                hint = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3"}.get(library)
                mend = f"sudo apt-get install {hint}" if hint else "install the package that has it"
                return f"{self.name} needs the library {library}, which this machine lacks: {mend}"
            if "No space left on device" in line:
                return f"{self.name} finds no space left on the disk of {self.log.parent}: free some (log: {self.log})"
        code = exit_code(self.process) or 0
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return f"{self.name} {how}; its last words: {self._last_words()} (log: {self.log})"

    def stop(self) -> None:
        """TERM, then KILL; returns when it is gone."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        for pattern in self._sockets:
            for socket in SOCKET_FOLDER.glob(pattern):
                with suppress(OSError):  # it is gone, or another user's
                    socket.unlink()
