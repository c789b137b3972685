"""Files through upload and job, a few at a time: what `headrace load` does."""

import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from api.client import TERMINAL, Client
from api.show import Bars, bars
from api.transfer import Transfer
from engine.errors import StartError

__all__ = ["EXIT_INTERRUPTED", "Loader"]

EXIT_INTERRUPTED: Final = 130
FILES_AT_A_TIME: Final = 4
POLL_SECONDS: Final = 0.5


class Loader:
    """Takes files through upload and job, a few at a time, with one bar each."""

    def __init__(self, client: Client, options: dict[str, Any], *, wait: bool, through_api: bool) -> None:
        self._client = client
        self._options = options
        self._wait = wait
        self._through_api = through_api
        self._transfer = Transfer(client)
        self._stopped = False
        self._jobs: list[str] = []

    def run(self, files: list[str]) -> list[dict[str, Any]]:
        """Load them; returns the last status of each job."""
        console = Console(highlight=False, stderr=True)
        pool = ThreadPoolExecutor(min(FILES_AT_A_TIME, len(files)), thread_name_prefix="file")
        try:
            with bars(console) as shown:
                futures: list[Future[dict[str, Any]]] = [pool.submit(self._one, file, shown) for file in files]
                return [future.result() for future in futures]
        except BaseException as error:
            self._stopped = True
            self._transfer.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                self._interrupted()
            raise
        finally:
            pool.shutdown(wait=False)

    def _interrupted(self) -> None:
        told = [f"watch it with `headrace status {job} --wait`" for job in self._jobs]
        told = told or ["run the same command again, and it goes on where it was"]
        print(f"headrace: interrupted; the jobs go on without you: {'; '.join(told)}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)  # threads in the midst of a request would keep the process

    def _one(self, file: str, shown: Bars) -> dict[str, Any]:
        task = shown.add(Path(file).name if file != "-" else "standard input")
        key = self._key(file, shown, task)
        job_id = self._client.process(key, self._options)
        self._jobs.append(job_id)
        while True:
            status = self._client.status(job_id)
            shown.processed(task, status)
            if not self._wait or self._stopped or status["status"] in TERMINAL:
                return status
            time.sleep(POLL_SECONDS)

    def _key(self, file: str, shown: Bars, task: Any) -> str:
        if file.startswith("s3://"):
            bucket, _, key = file.removeprefix("s3://").partition("/")
            there = self._client.ask("GET", "/files", params={"prefix": key, "limit": 1})["bucket"]
            if bucket != there:
                raise StartError(
                    f"{file}: this API reads bucket {there} only; put the object there, or ask another API"
                )
            return key
        began, count = time.monotonic(), [0]
        size = None if file == "-" else Path(file).stat().st_size

        def sent(number: int) -> None:
            count[0] += number
            shown.uploaded(task, count[0], size, count[0] / max(time.monotonic() - began, 0.001))

        if file == "-":
            return self._transfer.stream(sys.stdin.buffer, "stdin.ndjson", sent)
        if self._through_api:
            return self._client.upload(Path(file))
        return self._transfer.file(Path(file), sent)
