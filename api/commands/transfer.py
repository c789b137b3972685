"""Sends files directly to S3: parts in parallel, to URLs that the API signs, and nothing twice."""

import hashlib
import io
import re
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
from api.commands.notes import Note
from engine.errors import CommandError, HeadraceError

__all__ = ["Transfer"]

PARALLEL: Final = 4
"""Parts in flight at a time, of all files together."""

IN_FLIGHT_BYTES: Final = 64 * 1024 * 1024
"""Most bytes of one file's parts that are held in memory while they are sent; one part may be larger."""

TRIES: Final = 5
"""Tries of a part. Once S3 has answered anything, they continue until `PATIENCE_SECONDS` have passed."""

MOST_WAIT_SECONDS: Final = 5.0
"""Longest pause between two tries."""

URLS: Final = 100
"""Signed URLs that are asked for at a time."""

URLS_FRESH_SECONDS: Final = 600.0
"""How long signed URLs are used: they are valid for an hour, but no longer than the credentials that signed them. Those
of a machine's role are renewed ten minutes before they expire."""

STREAM_PART_BYTES: Final = 16 * 1024 * 1024
"""Size of the parts of a stream of unknown length: ten thousand of them are 156 GiB, or 168 GB."""

LAST_CALL_SECONDS: Final = 0.3
"""How long the end of a stream is not trusted: a Ctrl-C also ends the program that writes it, which looks like the end
of the data."""

STOPPED: Final = "sending was stopped"

UNSIZED: Final = (
    "it does not have the size that the system says, as in /proc: pipe it, as in `cat FILE | headrace load -`"
)

LAST_PARTS_SECONDS: Final = 2.0
"""How long a stop waits for parts of streams in flight: one that arrives after its upload was aborted would stay in S3,
known to nobody."""

USELESS: Final = (404, 409, 422)
"""Statuses with which completing an upload fails for good: its parts are gone, or will never make an object."""

Sent = Callable[[int], None]
"""Called with the number of bytes that were sent since the last call."""


class Transfer:
    """Sends files. Thread-safe, with one file per thread; together they send `PARALLEL` parts at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._http = httpx.Client(timeout=httpx.Timeout(30, write=600, read=600), trust_env=False, verify=trusted())
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="part")
        self._stopped = threading.Event()
        self._reached = False  # whether S3 has answered anything yet
        self._deciding = threading.Lock()
        self._streams: set[str] = set()  # uploads of streams whose end is not trusted yet
        self._flying: set[Future[None]] = set()

    def stop(self) -> None:
        """Send no more parts, and abort the uploads of streams whose end is not trusted yet: they cannot be resumed."""
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
        """Send a file; returns its key. `sent` also counts the bytes that S3 has already.

        Raises:
            OSError: the file cannot be read.
            CommandError: the file was written to meanwhile, or S3 cannot be reached from here or refuses a part.
            CallFailed: a call of the API failed.
        """
        with file.open("rb") as content:
            return self._file(content, file.name, note, sent)

    def _file(self, content: IO[bytes], name: str, note: Note, sent: Sent) -> str:
        version = version_of(content)
        size = version[0]
        if not size and content.read(1):
            raise CommandError(UNSIZED)
        state = self._resumed(note)
        if state is None and (made := self._completed(note, size)) is not None:
            sent(size)
            return note.stored(made)
        if state is None:
            state = self._client.insist("POST", "/uploads", json={"fileName": utf8_name(name), "size": size})
            note.put(uploadId=state["uploadId"])
        there = {part["partNumber"]: part for part in state["stored"]}

        def read(number: int) -> bytes:
            start = (number - 1) * state["partBytes"]
            content.seek(start)
            data = content.read(min(state["partBytes"], size - start))  # the file may have grown since
            if version_of(content) != version:
                return b""  # it is of no use any more, as is told below
            if len(data) != min(state["partBytes"], size - start):
                raise CommandError(UNSIZED)
            return data

        self._send(state, there, read, sent)
        if version_of(content) != version:
            # Lines would be torn where parts of two versions meet.
            self._free(state)
            note.forget()
            raise CommandError(f"{name} {CHANGED}")
        return note.stored(self._complete(state))

    def stream(self, content: IO[bytes], name: str, sent: Sent, ended: Callable[[str], None]) -> str:
        """Send a stream to its end; returns its key. It cannot be resumed: on failure its parts are freed, unless S3
        has all of them and they may still become an object.

        `ended` is called when the end of the stream is trusted, with a sentence that says how to create its job by
        hand: from then on a stop does not undo the upload.

        Raises:
            CommandError: it was stopped before, the stream is longer than an upload can be, S3 cannot be reached from
                here or refuses a part, or the upload could not be completed for now.
            CallFailed: a call of the API failed.
        """
        asked = {"fileName": utf8_name(name), "partBytes": STREAM_PART_BYTES}
        # If an answer is lost, the upload is begun twice; the one that is not used is aborted after a day.
        state = self._client.insist("POST", "/uploads", json=asked)
        self._streams.add(state["uploadId"])
        by_hand = (
            f"all of it is in S3 for a day: POST {self._client.url}/uploads/{state['uploadId']}/complete makes it an "
            f"object, then POST /process/{path_of(state['fileKey'])} creates its job"
        )
        try:
            all_read = self._send(state, {}, lambda number: _exactly(content, state["partBytes"]), sent)
            if not all_read and _exactly(content, 1):
                most = state["parts"] * state["partBytes"]
                raise CommandError(
                    f"a stream may have at most {most / 1e9:,.0f} GB: save it to a file, or send it in pieces"
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
        """The key of the object that an earlier command made of this very file; if it is no longer there, the note is
        forgotten.

        A token that may only submit cannot check that: the note is then trusted.
        """
        if (key := note.get("key")) is None:
            return None
        try:
            found = self._client.insist("GET", f"/files/{path_of(key)}")
            # Somebody may have put another object of the same size there. Notes of earlier versions have no ETag.
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
        """The upload of this very file that an earlier command began, if it is still under way."""
        if (upload_id := note.get("uploadId")) is None:
            return None
        return self._unless_gone("GET", f"/uploads/{quote(upload_id, safe='')}", params={"count": URLS})

    def _completed(self, note: Note, size: int) -> dict[str, Any] | None:
        """The object of this very file, if its upload was completed but the answer was lost."""
        if (upload_id := note.get("uploadId")) is None:
            return None
        answer = self._unless_gone("POST", f"/uploads/{quote(upload_id, safe='')}/complete", timeout=SLOW)
        return answer if answer is not None and answer["size"] == size else None

    def _unless_gone(self, method: str, path: str, **more: Any) -> dict[str, Any] | None:
        """The answer of the API; None if it is 404."""
        try:
            return self._client.insist(method, path, **more)
        except CallFailed as error:
            if error.status != 404:
                raise
        return None

    def _send(self, state: dict[str, Any], there: dict[int, Any], read: Callable[[int], bytes], sent: Sent) -> bool:
        """Send the parts; returns whether the data ended before the upload had all the parts that it may have."""
        urls, fresh_until = _urls(state), _now() + URLS_FRESH_SECONDS
        in_flight: set[Future[None]] = set()
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
                if number not in urls or _now() > fresh_until:
                    urls, fresh_until = self._signed(state, number, URLS), _now() + URLS_FRESH_SECONDS
                future = self._pool.submit(self._put, number, urls.pop(number), data, state, sent)
                in_flight.add(future)
                self._flying.add(future)
                future.add_done_callback(self._flying.discard)
                # The parts of a file of terabytes are large, and each is held in memory while it is sent.
                if len(in_flight) >= max(1, min(PARALLEL, IN_FLIGHT_BYTES // state["partBytes"])):
                    done, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in in_flight:
                future.result()
            return ended
        except BaseException:
            # A part that arrives after its upload was aborted would stay in S3, known to nobody.
            wait([future for future in in_flight if not future.cancel()])
            raise

    def _signed(self, state: dict[str, Any], first: int, count: int) -> dict[int, str]:
        """Freshly signed URLs of `count` parts from number `first` on, by part number."""
        asked = {"first": first, "count": count}
        return _urls(self._client.insist("GET", f"/uploads/{state['uploadId']}", params=asked))

    def _put(self, number: int, url: str, data: bytes, state: dict[str, Any], sent: Sent) -> None:
        failing: float | None = None
        tries, renewed = 0, False
        while True:
            if self._stopped.is_set():
                raise CommandError(STOPPED)
            try:
                # As a stream: from bytes, the rest of the part would be copied for each write to the socket.
                answer = self._http.put(url, content=io.BytesIO(data), headers=state["headers"])
                self._reached = True
                if answer.is_success:
                    sent(len(data))
                    return
                code = re.search("<Code>([A-Za-z]+)</Code>", answer.text)
                failure = f"was answered with {answer.status_code}{f' ({code[1]})' if code else ''}"
                if answer.status_code == 403 and not renewed:
                    # The URL may have expired, or the credentials that signed it.
                    url, renewed = self._signed(state, number, 1)[number], True
                    continue
                # AWS answers a part that arrives too slowly with 400 RequestTimeout.
                if answer.status_code < 500 and "RequestTimeout" not in answer.text:
                    break
            except httpx.HTTPError as error:
                failure = f"failed {why_not_reached(error)}"
            tries += 1
            failing = failing or time.monotonic()
            # An S3 that has answered before is waited for, as the API is.
            if tries >= TRIES and (not self._reached or time.monotonic() - failing > PATIENCE_SECONDS):
                break
            self._stopped.wait(min(0.1 * 2**tries, MOST_WAIT_SECONDS))
        again = "run the same command again to continue, or send the file"
        if state["size"] is None:
            again = "nothing of the stream is kept: send it again, or save it to a file and send that"
        raise CommandError(
            f"sending a part to S3 at {httpx.URL(url).host} {failure}: {again} --through-api if S3 cannot be "
            "reached from here"
        )

    def _complete(self, state: dict[str, Any]) -> dict[str, Any]:
        return self._client.insist("POST", f"/uploads/{state['uploadId']}/complete", timeout=SLOW)


def _urls(state: dict[str, Any]) -> dict[int, str]:
    return {part["partNumber"]: part["url"] for part in state["urls"]}


def _now() -> float:
    """Seconds on a clock that, unlike the monotonic one, also runs while the machine sleeps: signed URLs expire then."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _exactly(content: IO[bytes], size: int) -> bytes:
    pieces: list[bytes] = []
    while size:
        piece: bytes | None = content.read(size)
        if piece is None:  # a pipe that another program made non-blocking is empty right now
            select.select([content], [], [])
            continue
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
