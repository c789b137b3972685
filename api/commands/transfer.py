"""A file from here to S3, directly: its parts in parallel, to URLs that the API signs; what was sent once is not sent again.

Where a file stands is noted in the user's state folder: the same command goes on where the last one was stopped, and loads the
object that is there where the file has not changed since.
"""

import hashlib
import io
import os
import re
import secrets
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote

import httpx
import orjson

from api.client import (
    CHANGED,
    PATIENCE_SECONDS,
    SLOW,
    CallFailed,
    Client,
    path_of,
    trusted,
    utf8_name,
    version_of,
    why_not_reached,
)
from engine.errors import CommandError, HeadraceError

__all__ = ["Note", "Transfer", "forget_old"]

PARALLEL: Final = 4

FLYING_BYTES: Final = 64 * 1024 * 1024
"""Parts of one file that are held while they are sent, where it is larger than one."""

TRIES: Final = 5
"""Tries of a part. Once S3 has answered anything, they go on until `PATIENCE_SECONDS` have passed."""

MOST_WAIT_SECONDS: Final = 5.0
"""Between two tries."""

URLS: Final = 100

URLS_FRESH_SECONDS: Final = 600.0
"""How long signed URLs are used: they are good for an hour, but no longer than the credentials that signed them. Those of a
machine's role are renewed ten minutes before they end."""

STREAM_PART_BYTES: Final = 16 * 1024 * 1024
"""Parts of a stream of unknown length: ten thousand of them are 156 GiB, or 168 GB."""

LAST_CALL_SECONDS: Final = 0.3
"""How long the end of a stream is not trusted: a Ctrl-C also ends the program that writes it, which looks like the end of the
data."""

KEEP_SECONDS: Final = 30 * 24 * 3600.0
"""How long a file is remembered that is not loaded again."""

STOPPED: Final = "sending was stopped"

LAST_PARTS_SECONDS: Final = 2.0
"""How long a stop waits for the parts of streams that are under way: one that arrives after the end of its upload would stay
in S3, known to nobody."""

USELESS: Final = (404, 409, 422)
"""Where completing an upload is answered so, its parts are gone, or will never make an object."""

Sent = Callable[[int], None]


def _folder() -> Path:
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not given.is_absolute():  # a relative one counts as none
        try:
            given = Path.home() / ".local" / "state"
        except RuntimeError:  # a user of whom nothing is known, and no HOME
            given = Path(os.devnull)  # where nothing can be kept
    return given / "headrace" / "loads"


def forget_old() -> None:
    """Forget the files that have not been loaded for long."""
    with suppress(OSError):
        for note in _folder().iterdir():
            if time.time() - note.stat().st_mtime > KEEP_SECONDS:
                note.unlink(missing_ok=True)


class Note:
    """What is known of a file: `uploadId` while it is on its way, then `key` and `etag` of its object, and a `ticket` that
    makes its job once, with what was `asked` by it.

    Args:
        url: of the API.
        name: of the file, in full.
        stamp: what must be the same for the file to be the same.
    """

    def __init__(self, url: str, name: str, stamp: list[Any]) -> None:
        self._file = _folder() / hashlib.sha256(f"{url}\n".encode() + os.fsencode(name)).hexdigest()
        self._state: dict[str, Any] = {"stamp": stamp, "ticket": secrets.token_hex(16)}
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = orjson.loads(self._file.read_bytes())
            if known["stamp"] == stamp and isinstance(known["ticket"], str):
                self._state = known

    def get(self, name: str) -> str | None:
        """What is known; None where it is not."""
        found = self._state.get(name)
        return found if isinstance(found, str) else None

    def put(self, **known: str) -> None:
        """Keep this; without a place to keep it, the load only cannot be resumed."""
        self._state |= known
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_bytes(orjson.dumps(self._state))

    def stored(self, made: dict[str, Any]) -> str:
        """Keep what the API answered of the object that was made of the file; returns its key."""
        self.put(key=made["fileKey"], etag=made["etag"])
        return str(made["fileKey"])

    def ticket(self, options: dict[str, Any]) -> str:
        """The same for the same file and options, until it is forgotten."""
        whole = orjson.dumps([self._state["ticket"], options], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(whole).hexdigest()

    def done(self) -> None:
        """The command is through: the next one is a job of its own, of the object that is there."""
        self.put(ticket=secrets.token_hex(16))

    def forget(self) -> None:
        """What was uploaded is gone: the file is to be uploaded again, for a job of its own."""
        self._state = {"stamp": self._state["stamp"], "ticket": secrets.token_hex(16)}
        with suppress(OSError):
            self._file.unlink(missing_ok=True)


class Transfer:
    """Sends files. Safe to use from threads, one file each; together they send so many parts at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._http = httpx.Client(timeout=httpx.Timeout(30, write=600, read=600), trust_env=False, verify=trusted())
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="part")
        self._stopped = threading.Event()
        self._reached = False  # whether S3 has answered anything yet
        self._deciding = threading.Lock()
        self._streams: set[str] = set()  # of which the end is not taken for the end yet
        self._flying: set[Future[None]] = set()

    def stop(self) -> None:
        """Send no more parts, and free those of streams, which cannot be resumed. A stream that is not whole by now never is."""
        with self._deciding:
            self._stopped.set()
            streams = list(self._streams)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if streams:
            wait(list(self._flying), timeout=LAST_PARTS_SECONDS)
        for upload_id in streams:
            with suppress(HeadraceError):
                self._client.ask("DELETE", f"/uploads/{upload_id}", timeout=5)

    def file(self, file: Path, note: Note, sent: Sent) -> str:
        """Send a file; returns its key. `sent` is called with numbers of bytes, those that were there already too.

        Raises:
            CommandError: the file cannot be read, or was written to meanwhile, or S3 cannot be reached from here.
            CallFailed: of the API.
        """
        with file.open("rb") as content:
            return self._file(content, file.name, note, sent)

    def _file(self, content: IO[bytes], name: str, note: Note, sent: Sent) -> str:
        version = version_of(content)
        size = version[0]
        state = self._resumed(note)
        if state is None and (made := self._completed(note, size)) is not None:
            sent(size)
            return note.stored(made)
        if state is None:
            state = self._client.insist("POST", "/uploads", json={"fileName": utf8_name(name), "size": size})
            note.put(uploadId=state["uploadId"])
        there = {part["partNumber"]: part for part in state["stored"]}
        self._send(state, there, lambda number: _part(content, number, state["partBytes"], size), sent)
        if version_of(content) != version:
            # Of two versions, lines would be torn where their parts meet.
            self._free(state)
            note.forget()
            raise CommandError(f"{name} {CHANGED}")
        return note.stored(self._complete(state))

    def stream(self, content: IO[bytes], name: str, sent: Sent, ended: Callable[[str], None]) -> str:
        """Send a stream to its end; returns its key. It cannot be resumed: when it fails, its parts are freed, unless all of them
        are there and may still become an object.

        `ended` is called when the end of the stream has been taken for its end, with a sentence that says how to make its job by
        hand: from then on a stop does not undo the upload.

        Raises:
            CommandError: it was stopped before, or S3 cannot be reached from here, or the stream is longer than an upload can be.
            CallFailed: of the API.
        """
        asked = {"fileName": utf8_name(name), "partBytes": STREAM_PART_BYTES}
        # One that is begun twice, since an answer was lost, is aborted after a day.
        state = self._client.insist("POST", "/uploads", json=asked)
        self._streams.add(state["uploadId"])
        by_hand = (
            f"all of it is in S3, for a day: POST {self._client.url}/uploads/{state['uploadId']}/complete makes it an object, "
            f"and then POST /process/{path_of(state['fileKey'])} its job"
        )
        try:
            all_read = self._send(state, {}, lambda number: _exactly(content, state["partBytes"]), sent)
            if not all_read and _exactly(content, 1):
                most = state["parts"] * state["partBytes"]
                raise CommandError(
                    f"a stream may have {most / 1e9:,.0f} GB at most: put it into a file, or send it in pieces"
                )
            self._stopped.wait(LAST_CALL_SECONDS)
            with self._deciding:
                if self._stopped.is_set():
                    raise CommandError(STOPPED)
                self._streams.discard(state["uploadId"])
                ended(by_hand)
        except BaseException:
            self._free(state)
            raise
        finally:
            self._streams.discard(state["uploadId"])
        try:
            return str(self._complete(state)["fileKey"])
        except CallFailed as error:
            if error.status in USELESS:
                self._free(state)
                raise
            raise CommandError(f"{error}; {by_hand}") from None

    def _free(self, state: dict[str, Any]) -> None:
        with suppress(HeadraceError):
            self._client.ask("DELETE", f"/uploads/{state['uploadId']}")

    def there(self, note: Note, size: int) -> str | None:
        """The key of the object that an earlier command made of this very file, where it still is; else it is forgotten.

        A token that may only submit cannot look: then it is believed.
        """
        if (key := note.get("key")) is None:
            return None
        try:
            found = self._client.insist("GET", f"/files/{path_of(key)}")
            # Another may have put an object of the same size there. Notes of earlier versions have no ETag.
            if found["size"] == size and note.get("etag") in (None, found["etag"]):
                return key
        except CallFailed as error:
            if error.status == 403:
                return key
            if error.status != 404:
                raise
        note.forget()
        return None

    def _resumed(self, note: Note) -> dict[str, Any] | None:
        """The upload that an earlier command began of this very file, where it is still under way."""
        if (upload_id := note.get("uploadId")) is None:
            return None
        try:
            return self._client.insist("GET", f"/uploads/{quote(upload_id, safe='')}", params={"count": URLS})
        except CallFailed as error:
            if error.status != 404:
                raise
        return None

    def _completed(self, note: Note, size: int) -> dict[str, Any] | None:
        """The object of this very file, where its upload was completed and the answer did not get here."""
        if (upload_id := note.get("uploadId")) is None:
            return None
        try:
            answer = self._client.insist("POST", f"/uploads/{quote(upload_id, safe='')}/complete", timeout=SLOW)
        except CallFailed as error:
            if error.status != 404:
                raise
            return None
        return answer if answer["size"] == size else None

    def _send(self, state: dict[str, Any], there: dict[int, Any], read: Callable[[int], bytes], sent: Sent) -> bool:
        """Send the parts; returns whether what is read came to its end before all the parts that there may be were sent."""
        urls, fresh_until = _signed(state)
        flying: set[Future[None]] = set()
        ended = False
        try:
            for number in range(1, state["parts"] + 1):
                data = read(number)
                if not data and (number > 1 or state["size"] is not None) and state["size"] != 0:
                    ended = True
                    break
                part = there.get(number)
                if part is not None and part["etag"] == hashlib.md5(data, usedforsecurity=False).hexdigest():
                    sent(len(data))
                    continue
                if number not in urls or time.monotonic() > fresh_until:
                    asked = {"first": number, "count": URLS}
                    more = self._client.insist("GET", f"/uploads/{state['uploadId']}", params=asked)
                    urls, fresh_until = _signed(more)
                future = self._pool.submit(self._put, urls.pop(number), data, state, sent)
                flying.add(future)
                self._flying.add(future)
                future.add_done_callback(self._flying.discard)
                # The parts of a file of terabytes are large, and each is held while it is sent.
                if len(flying) >= max(1, min(PARALLEL, FLYING_BYTES // state["partBytes"])):
                    done, flying = wait(flying, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in flying:
                future.result()
            return ended
        except BaseException:
            # A part that arrives after the end of its upload would stay in S3, known to nobody.
            wait([future for future in flying if not future.cancel()])
            raise

    def _put(self, url: str, data: bytes, state: dict[str, Any], sent: Sent) -> None:
        failing: float | None = None
        tries = 0
        while True:
            if self._stopped.is_set():
                raise CommandError(STOPPED)
            try:
                # As a stream: of bytes, all that is left of a part is copied each time that a socket takes some.
                answer = self._http.put(url, content=io.BytesIO(data), headers=state["headers"])
                self._reached = True
                if answer.is_success:
                    sent(len(data))
                    return
                code = re.search("<Code>([A-Za-z]+)</Code>", answer.text)
                failure = f"was answered with {answer.status_code}{f' ({code[1]})' if code else ''}"
                # A part that comes too slowly is answered by AWS with 400.
                if answer.status_code < 500 and "RequestTimeout" not in answer.text:
                    break
            except httpx.HTTPError as error:
                failure = f"failed {why_not_reached(error)}"
            tries += 1
            failing = failing or time.monotonic()
            # An S3 that was there is waited for, as the API is.
            if tries >= TRIES and (not self._reached or time.monotonic() - failing > PATIENCE_SECONDS):
                break
            self._stopped.wait(min(0.1 * 2**tries, MOST_WAIT_SECONDS))
        again = "run the same command again to go on, or send the file"
        if state["size"] is None:
            again = "nothing of the stream is kept: send it again, or put it into a file and send that"
        raise CommandError(
            f"sending a part to S3 at {httpx.URL(url).host} {failure}: {again} --through-api where S3 cannot be reached from here"
        )

    def _complete(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._client.insist("POST", f"/uploads/{state['uploadId']}/complete", timeout=SLOW)


def _signed(state: dict[str, Any]) -> tuple[dict[int, str], float]:
    """URLs by number of part, and until when they are used, on the monotonic clock."""
    return {part["partNumber"]: part["url"] for part in state["urls"]}, time.monotonic() + URLS_FRESH_SECONDS


def _part(content: IO[bytes], number: int, part_bytes: int, size: int) -> bytes:
    """Part `number` of the first `size` bytes: a file may have grown since it was asked for its size."""
    start = (number - 1) * part_bytes
    content.seek(start)
    return content.read(min(part_bytes, size - start))


def _exactly(content: IO[bytes], size: int) -> bytes:
    pieces: list[bytes] = []
    while size:
        piece: bytes | None = content.read(size)
        if piece is None:  # a pipe that another program has made non-blocking has nothing just now
            select.select([content], [], [])
            continue
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
