"""A file from here to S3, directly: its parts in parallel, to URLs that the API signs; what was sent once is not sent again.

Where an upload stands is kept in the user's state folder, so that the same command goes on where the last one was stopped.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

import httpx
import orjson

from api.client import CallFailed, Client, check_file
from engine.errors import HeadraceError, StartError

__all__ = ["Transfer"]

PARALLEL: Final = 4
TRIES: Final = 5
URLS: Final = 100
STREAM_PART_BYTES: Final = 16 * 1024 * 1024
"""Parts of a stream of unknown length: ten thousand of them are 160 GB."""

Sent = Callable[[int], None]


class Transfer:
    """Sends files. Safe to use from threads, one file each; together they send so many parts at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._http = httpx.Client(timeout=httpx.Timeout(30, write=600, read=600), trust_env=False)
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="part")
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Send no more parts."""
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def file(self, file: Path, sent: Sent) -> str:
        """Send a file; returns its key. `sent` is called with numbers of bytes, those that were there already too.

        Raises:
            StartError: the file cannot be read, or S3 cannot be reached from here.
            CallFailed: of the API.
        """
        check_file(file)
        size, changed = file.stat().st_size, file.stat().st_mtime_ns
        note = _notes() / hashlib.sha256(f"{self._client.url}\n{file.resolve()}".encode()).hexdigest()
        state = self._resumed(note, size, changed)
        if state is None:
            state = self._client.ask("POST", "/uploads", json={"fileName": file.name, "size": size})
            _write(note, {"uploadId": state["uploadId"], "size": size, "changed": changed})
        there = {part["partNumber"]: part for part in state["stored"]}
        with file.open("rb") as content:
            self._send(state, there, lambda number: _part(content, number, state["partBytes"]), sent)
        key = self._complete(state)
        note.unlink(missing_ok=True)
        return key

    def stream(self, content: IO[bytes], name: str, sent: Sent) -> str:
        """Send a stream to its end; returns its key. It cannot be resumed: when it fails, its parts are freed."""
        asked = {"fileName": name, "partBytes": STREAM_PART_BYTES}
        state = self._client.ask("POST", "/uploads", json=asked)
        try:
            self._send(state, {}, lambda number: _exactly(content, state["partBytes"]), sent)
            return self._complete(state)
        except BaseException:
            with suppress(HeadraceError):
                self._client.ask("DELETE", f"/uploads/{state['uploadId']}")
            raise

    def _resumed(self, note: Path, size: int, changed: int) -> dict[str, Any] | None:
        """The upload that an earlier command began of this very file, where it is still under way."""
        try:
            known = orjson.loads(note.read_bytes())
            if (known["size"], known["changed"]) == (size, changed):
                return self._client.ask("GET", f"/uploads/{known['uploadId']}", params={"count": URLS})
        except (OSError, ValueError, KeyError, TypeError):
            pass
        except CallFailed as error:
            if error.status != 404:
                raise
        return None

    def _send(self, state: dict[str, Any], there: dict[int, Any], read: Callable[[int], bytes], sent: Sent) -> None:
        urls = {part["partNumber"]: part["url"] for part in state["urls"]}
        flying: set[Future[None]] = set()
        try:
            for number in range(1, state["parts"] + 1):
                data = read(number)
                if not data and (number > 1 or state["size"] is not None) and state["size"] != 0:
                    break
                part = there.get(number)
                if part is not None and part["etag"] == hashlib.md5(data, usedforsecurity=False).hexdigest():
                    sent(len(data))
                    continue
                if number not in urls:
                    asked = {"first": number, "count": URLS}
                    more = self._client.ask("GET", f"/uploads/{state['uploadId']}", params=asked)
                    urls = {part["partNumber"]: part["url"] for part in more["urls"]}
                flying.add(self._pool.submit(self._put, urls.pop(number), data, state["headers"], sent))
                if len(flying) >= PARALLEL:
                    done, flying = wait(flying, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in flying:
                future.result()
        except BaseException:
            for future in flying:
                future.cancel()
            raise

    def _put(self, url: str, data: bytes, headers: dict[str, str], sent: Sent) -> None:
        said = ""
        for tries in range(TRIES):
            if self._stopped.is_set():
                return
            try:
                answer = self._http.put(url, content=data, headers=headers)
                if answer.is_success:
                    sent(len(data))
                    return
                said = f"was answered with {answer.status_code}"
                if answer.status_code < 500:
                    break
            except httpx.HTTPError as error:
                said = f"failed ({type(error).__name__})"
            self._stopped.wait(0.2 * 2**tries)
        where = httpx.URL(url).host
        raise StartError(
            f"sending a part to S3 at {where} {said}: run the same command again to go on, or send the file "
            "--through-api where S3 cannot be reached from here"
        )

    def _complete(self, state: dict[str, Any]) -> str:
        return str(self._client.ask("POST", f"/uploads/{state['uploadId']}/complete")["fileKey"])


def _part(content: IO[bytes], number: int, size: int) -> bytes:
    content.seek((number - 1) * size)
    return content.read(size)


def _exactly(content: IO[bytes], size: int) -> bytes:
    pieces: list[bytes] = []
    while size and (piece := content.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _notes() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "headrace" / "uploads"


def _write(note: Path, state: dict[str, Any]) -> None:
    """Keep where an upload stands; without that it only cannot be resumed."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(orjson.dumps(state))
