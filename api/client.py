"""The HTTP API from the other side: what the commands and `headrace up` call."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx

from engine.errors import HeadraceError, StartError

__all__ = ["CallFailed", "Client", "check_file"]

TERMINAL: Final = ("COMPLETED", "FAILED", "CANCELLED")


class CallFailed(HeadraceError):
    """The API answered with a problem; `status` is its HTTP status, 0 where it did not answer at all."""

    code = "call_failed"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_file(file: Path) -> None:
    """Raises StartError unless the file can be read."""
    if file.is_dir():
        raise StartError(f"{file} is a folder: name a file")
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise StartError(f"{file} cannot be read: {error.strerror}") from None


class Client:
    """The HTTP API at `url`. Safe to use from threads. Raises CallFailed with a sentence for whatever goes wrong."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(30, read=3600, write=3600)
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, headers=headers)

    def ready(self) -> bool:
        """Whether the API, MongoDB and S3 answer."""
        try:
            return self._http.get("/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def upload(self, file: Path) -> str:
        """Upload a file through the API; returns its key."""
        check_file(file)
        with file.open("rb") as content:
            return str(self.ask("POST", "/upload", files={"file": (file.name, content)})["fileKey"])

    def process(self, key: str, options: dict[str, Any]) -> str:
        """Submit a job for a key; returns the job's id."""
        return str(self.ask("POST", f"/process/{quote(key, safe='/')}", json=options)["jobId"])

    def status(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return self.ask("GET", f"/status/{quote(job_id, safe='')}")

    def rejected(self, job_id: str) -> Iterator[bytes]:
        """The raw lines that a job rejected, piece by piece."""
        path = f"/jobs/{quote(job_id, safe='')}/rejects"
        try:
            with self._http.stream("GET", path, params={"format": "ndjson"}) as answer:
                if not answer.is_success:
                    answer.read()
                    raise self._problem("GET", path, answer)
                yield from answer.iter_bytes()
        except httpx.HTTPError as error:
            raise self._silent(error) from None

    def ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """Call the API; returns the JSON that it answers with, {} where there is none."""
        try:
            answer = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        if not answer.is_success:
            raise self._problem(method, path, answer)
        try:
            told = answer.json() if answer.content else {}
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise CallFailed(answer.status_code, f"{self.url} does not speak as Headrace does: check API_URL and PORT")
        return told

    def _silent(self, error: Exception) -> CallFailed:
        why = type(error).__name__
        return CallFailed(
            0, f"{self.url} does not answer ({why}): start `headrace api`, or set API_URL to where it runs"
        )

    def _problem(self, method: str, path: str, answer: httpx.Response) -> CallFailed:
        try:
            told = answer.json()
        except ValueError:
            told = {}
        detail = told.get("detail") if isinstance(told, dict) else None
        if answer.status_code == 401 and detail:
            detail += "; set API_TOKEN"
        return CallFailed(
            answer.status_code, detail or f"{method} {path} was answered with {answer.status_code}: {answer.text[:200]}"
        )
