"""The client behind `headrace load` and `headrace up`: upload a file over HTTP, submit its job, watch it to the end."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from engine.errors import HeadraceError, StartError

__all__ = ["Client", "check_file", "watch"]

POLL_SECONDS: Final = 0.5
TERMINAL: Final = ("COMPLETED", "FAILED", "CANCELLED")


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
    """The HTTP API at `url`. Raises StartError with a sentence for whatever goes wrong."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(base_url=self._url, timeout=httpx.Timeout(30, read=3600, write=3600), trust_env=False)

    def ready(self) -> bool:
        """Whether the API, MongoDB and S3 answer."""
        try:
            return self._http.get("/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def upload(self, file: Path) -> str:
        """Upload a file; returns its key."""
        check_file(file)
        with file.open("rb") as content:
            return str(self._ask("POST", "/upload", files={"file": (file.name, content)})["fileKey"])

    def process(self, key: str, options: dict[str, Any]) -> str:
        """Submit a job for a key; returns the job's id."""
        return str(self._ask("POST", f"/process/{quote(key, safe='/')}", json=options)["jobId"])

    def status(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return self._ask("GET", f"/status/{job_id}")

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise StartError(
                f"{self._url} does not answer ({type(error).__name__}): is `headrace api` running?"
            ) from None
        try:
            told = answer.json()
        except ValueError:
            told = {}
        if answer.is_success and isinstance(told, dict):
            return told
        detail = told.get("detail") if isinstance(told, dict) else None
        raise StartError(f"{method} {path} was answered with {answer.status_code}: {detail or answer.text[:200]}")


def watch(client: Client, job_id: str, console: Console) -> dict[str, Any]:
    """Show a job's progress until it ends; returns its last status. A moving bar on a terminal, lines elsewhere."""
    with _bar(console) as show:
        while True:
            status = client.status(job_id)
            show(status)
            if status["status"] in TERMINAL:
                return status
            time.sleep(POLL_SECONDS)


@contextmanager
def _bar(console: Console) -> Iterator[Any]:
    columns = (
        TextColumn("{task.fields[state]}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f} %  {task.fields[lines]:,} lines  {task.fields[rate]:,.0f} records/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("load", total=100, state="PENDING", lines=0, rate=0)
        said = [0.0]

        def show(status: dict[str, Any]) -> None:
            told = status["progress"]
            state, lines, rate = status["status"], told["lines"], told["recordsPerSecond"]
            progress.update(task, completed=told["percent"], state=state, lines=lines, rate=rate)
            if not console.is_terminal and (state in TERMINAL or time.monotonic() - said[0] >= 1):
                said[0] = time.monotonic()
                console.print(f"{state:<10} {told['percent']:>5.1f} %  {lines:,} lines  {rate:,.0f} records/s")

        yield show


def plainly(error: HeadraceError) -> None:
    """Tell an error to a person, on standard error."""
    print(f"headrace: {error}", file=sys.stderr)
