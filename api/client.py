"""A client of the HTTP API, for the commands and `headrace up`."""

import os
import re
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final, cast
from urllib.parse import quote

import certifi
import httpx

from engine.errors import CommandError, HeadraceError
from engine.model import TERMINAL
from engine.settings import Settings

__all__ = [
    "AWAY",
    "CHANGED",
    "PATIENCE_SECONDS",
    "SLOW",
    "CallFailed",
    "Client",
    "check_file",
    "is_stream",
    "local_url",
    "path_of",
    "trusted",
    "url_of",
    "utf8_name",
    "version_of",
    "why_not_reached",
]

WAIT_SECONDS: Final = 20
"""How long the API is asked to wait for a job to change."""

QUIET_SECONDS: Final = 3
"""After this long without a change, the API is asked what the job waits for."""

POLL_SECONDS: Final = 0.5
"""Pause between two requests where the API does not wait, or fails."""

PATIENCE_SECONDS: Final = 60.0
"""How long the API, or S3, may be unreachable before a load or the watch of a job gives up."""

AWAY: Final = (0, 502, 503, 504)
"""Statuses of failures that usually pass by themselves; 0: there was no answer."""

LASTING: Final = ("access_denied", "wrong_clock", "token_expired")
"""Types of problems with these statuses that do not pass until somebody acts."""

READ_SECONDS: Final = 120.0
"""How long the answer to most requests may take."""

SLOW_SECONDS: Final = 3600.0
"""How long a slow call may take to answer: storing a file, assembling an object from its parts, fetching rejects."""

SLOW: Final = httpx.Timeout(30, read=SLOW_SECONDS, write=SLOW_SECONDS)

CHANGED: Final = (
    "was written to while it was sent, so what arrived mixes two versions: run the command again when nothing writes "
    "to it, or load a copy"
)


class CallFailed(HeadraceError):
    """A call failed. `status` is the HTTP status, 0 without an answer; `problem` the end of the problem's type."""

    code = "call_failed"

    def __init__(self, status: int, message: str, problem: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem

    @property
    def passes(self) -> bool:
        """Whether the same call may succeed a little later."""
        return self.status in AWAY and self.problem not in LASTING


def path_of(key: str) -> str:
    """A key quoted for the path of a URL; segments `.` and `..` too, which clients would otherwise resolve."""
    return "/".join({".": "%2E", "..": "%2E%2E"}.get(part, quote(part, safe="")) for part in key.split("/"))


def check_file(file: Path) -> None:
    """Raises CommandError unless the file can be read."""
    try:
        if file.is_dir():
            raise CommandError(f"{file} is a folder: name a file")
        if is_stream(file):
            return  # it can be read only once
        with file.open("rb"):
            pass
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {error.strerror}") from None


def version_of(content: IO[bytes]) -> tuple[int, int]:
    """What changes whenever somebody writes to a file: its size in bytes and its modification time in nanoseconds."""
    found = os.fstat(content.fileno())
    return found.st_size, found.st_mtime_ns


def utf8_name(name: str) -> str:
    """A file name as valid UTF-8: bytes that are not are replaced."""
    return os.fsencode(name).decode(errors="replace")


def _reachable(host: str) -> str:
    """The host, written for a URL, at which to reach a server on this machine that listens on `host`."""
    if host in ("0.0.0.0", ""):  # noqa: S104 (nothing is bound here)
        return "127.0.0.1"
    if host in ("::", "[::]"):
        return "[::1]"  # waitress listens there for IPv6 only
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def local_url(settings: Settings) -> str:
    """The URL of the API that listens on this machine."""
    return f"http://{_reachable(settings.api_host)}:{settings.port}"


def url_of(settings: Settings) -> str:
    """The URL of the API that commands call."""
    return settings.api_url or local_url(settings)


def is_stream(file: Path) -> bool:
    """Whether it is a pipe or the like, which can be read only once, from its beginning."""
    return not stat.S_ISREG(file.stat().st_mode)


def trusted() -> ssl.SSLContext:
    """A TLS context that trusts well-known authorities, the system's, and those of SSL_CERT_FILE or SSL_CERT_DIR."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context


def why_not_reached(error: httpx.HTTPError) -> str:
    """Why a request got no answer, in brackets; with advice if the certificate's authority is unknown."""
    said = str(error)[:200]
    if re.search("issuer certificate|self.signed", said):
        said += "; set SSL_CERT_FILE to a file of further authorities to trust"
    return f"({type(error).__name__}{f': {said}' if said else ''})"


class _Counted:
    """A file that tells how much of it was read, as far as httpx needs one."""

    def __init__(self, content: IO[bytes], count: Callable[[int], None]) -> None:
        self._content = content
        self._count = count
        self.fileno = content.fileno  # httpx learns the size by it

    def read(self, size: int = -1) -> bytes:
        data = self._content.read(size)
        if data:
            self._count(len(data))
        return data


class Client:
    """A client of the HTTP API at `url`; thread-safe. Calls that fail raise CallFailed with a sentence."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            parsed = httpx.URL(self.url)
            parsed.host.encode("idna")  # connecting does this too, and would end in a traceback
        except (httpx.InvalidURL, UnicodeError):
            raise CommandError(
                f"{self.url} is not a valid address: check API_URL, or API_HOST if that is not set"
            ) from None
        if token and parsed.userinfo:
            raise CommandError(
                "API_URL has a user and API_TOKEN is set, but only one of them can be sent: remove the user or token"
            )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(30, read=READ_SECONDS, write=SLOW_SECONDS)
        self._http = httpx.Client(
            base_url=self.url, timeout=timeout, trust_env=False, headers=headers, verify=trusted()
        )

    def close(self) -> None:
        """Close the connections. A command that is about to exit need not."""
        self._http.close()

    def not_ready(self) -> str | None:
        """Which of the API, MongoDB and S3 does not answer, as a sentence; None if all do."""
        try:
            answer = self._http.get("/readyz", timeout=10)
        except httpx.HTTPError as error:
            return str(self._silent(error))
        return None if answer.is_success else str(self._problem("GET", "/readyz", answer))

    def upload(self, file: Path) -> str:
        """Upload a file through the API; returns its key. Raises CommandError if it is unreadable or changes."""
        return str(self.stored(file)["fileKey"])

    def stored(self, file: Path, sent: Callable[[int], None] = lambda number: None) -> dict[str, Any]:
        """Upload a file through the API; returns its answer, with `fileKey`, `size` and `etag`. `sent` is called with the
        number of bytes that were sent since the last call.

        Raises CommandError if the file cannot be read, or changes meanwhile.
        """
        check_file(file)
        with file.open("rb") as content:
            version = version_of(content)
            try:
                form = {"file": (utf8_name(file.name), cast("IO[bytes]", _Counted(content, sent)))}
                answer = self.ask("POST", "/upload", timeout=SLOW, files=form)
            except HeadraceError:
                if version_of(content) != version:
                    raise CommandError(f"{file.name} {CHANGED}") from None
                raise
            if version_of(content) != version:
                raise CommandError(
                    f"{file.name} {CHANGED}. What was stored as {answer['fileKey']} is useless: delete it"
                )
            return answer

    def process(self, key: str, options: dict[str, Any], ticket: str | None = None) -> tuple[str, str]:
        """Submit a job for a key; returns its id and state. A repeat with the same ticket returns the first job."""
        path = f"/process/{path_of(key)}"
        if ticket is None:
            made = self.ask("POST", path, json=options)
        else:
            made = self.insist("POST", path, json=options, headers={"Idempotency-Key": ticket})
        return str(made["jobId"]), str(made["status"])

    def status(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return self.ask("GET", f"/status/{quote(job_id, safe='')}")

    def states(
        self, job_id: str, wait: int = WAIT_SECONDS, check: Callable[[], None] = lambda: None
    ) -> Iterator[dict[str, Any]]:
        """The job's status now and after each change, until it has ended; while it waits, also with `waitingFor`.

        Args:
            job_id: the job's id.
            wait: for how many seconds the API is asked to wait for a change.
            check: called before each request; what it raises ends the watch.

        Raises CallFailed at once if the failure is final, else when calls have failed for `PATIENCE_SECONDS`.
        """
        path, detail = (f"/{of}/{quote(job_id, safe='')}" for of in ("status", "jobs"))
        headers: dict[str, str] = {}
        failing_since: float | None = None
        asked_seconds, early_until = 0, 0.0
        while True:
            check()
            try:
                answer = self._http.get(path, headers=headers, timeout=wait + 30)
                if not answer.is_success and answer.status_code != 304:
                    raise self._problem("GET", path, answer)
                unchanged = answer.status_code == 304
                if unchanged and time.monotonic() < early_until:
                    # The answer came early: after a 429 the request did not ask to wait, or the API is stopping. That
                    # is no reason to ask more often what the job waits for, for which the API reads all of its ranges.
                    failing_since = None
                    headers["Prefer"] = f"wait={asked_seconds}"
                    time.sleep(POLL_SECONDS)
                    continue
                status = self.ask("GET", detail) if unchanged else self._body_of(answer)
            except httpx.HTTPError as error:
                failed = self._silent(error)
            except CallFailed as error:
                failed = error
            else:
                failing_since = None
                if not unchanged or status.get("waitingFor"):
                    yield status
                if status["status"] in TERMINAL and not unchanged:
                    return
                asked_seconds = wait if unchanged else min(wait, QUIET_SECONDS)
                early_until = time.monotonic() + asked_seconds
                headers = {"Prefer": f"wait={asked_seconds}", "If-None-Match": answer.headers.get("ETag", "")}
                continue
            if failed.status != 429 and not failed.passes:
                raise failed
            failing_since = failing_since or time.monotonic()
            if failed.status == 429:
                headers.pop("Prefer", None)  # no slot is free for waiting: poll instead
            elif time.monotonic() - failing_since > PATIENCE_SECONDS:
                raise failed
            time.sleep(POLL_SECONDS)

    def rejected(self, job_id: str) -> Iterator[bytes]:
        """The raw lines that a job rejected, in pieces as they arrive."""
        path = f"/jobs/{quote(job_id, safe='')}/rejects"
        try:
            with self._http.stream("GET", path, timeout=SLOW, params={"format": "ndjson"}) as answer:
                if not answer.is_success:
                    answer.read()
                    raise self._problem("GET", path, answer)
                yield from answer.iter_bytes()
        except httpx.HTTPError as error:
            raise self._silent(error) from None

    def ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """Call the API; returns the JSON object of its answer, {} if the body is empty."""
        try:
            answer = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        if not answer.is_success:
            raise self._problem(method, path, answer)
        return self._body_of(answer)

    def insist(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """Like `ask`, for a call that is safe to repeat: failures that may pass are retried for `PATIENCE_SECONDS`."""
        failing_since: float | None = None
        while True:
            try:
                return self.ask(method, path, **more)
            except CallFailed as error:
                failing_since = failing_since or time.monotonic()
                if not error.passes or time.monotonic() - failing_since > PATIENCE_SECONDS:
                    raise
            time.sleep(POLL_SECONDS)

    def _body_of(self, answer: httpx.Response) -> dict[str, Any]:
        """The JSON object of an answer. Raises CallFailed if the answer is not Headrace's."""
        try:
            body = answer.json() if answer.content else {}
        except ValueError:
            body = None
        # Another server may answer {} to everything, but gives no request id.
        if not isinstance(body, dict) or "X-Request-ID" not in answer.headers:
            raise CallFailed(answer.status_code, f"{self.url} is not the API of Headrace: check API_URL and PORT")
        return body

    def _silent(self, error: httpx.HTTPError) -> CallFailed:
        why = why_not_reached(error)
        return CallFailed(0, f"{self.url} does not answer {why}: start `headrace api`, or set API_URL to where it runs")

    def _problem(self, method: str, path: str, answer: httpx.Response) -> CallFailed:
        try:
            body = answer.json()
        except ValueError:
            body = {}
        detail = body.get("detail") if isinstance(body, dict) else None
        if not isinstance(detail, str):  # the answer is not Headrace's
            detail = None
        if answer.status_code == 401 and detail:
            detail += "; set API_TOKEN"
        if answer.has_redirect_location and not detail:
            detail = f"{self.url} redirects to {answer.headers['Location'][:200]}: set API_URL to the API's own address"
        if answer.status_code == 413 and not detail:
            detail = "the file is too large for the API: raise API_MAX_UPLOAD_BYTES there, or use `headrace load`"
        return CallFailed(
            answer.status_code,
            detail or f"{method} {path} was answered with {answer.status_code}: {answer.text[:200]}",
            str(body.get("type", "")).rpartition(":")[2] if isinstance(body, dict) else "",
        )
