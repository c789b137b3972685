"""The database's own import tool, for comparison in the report. A failure of it costs only its own figures."""

import os
import signal
import statistics
import subprocess
import time
import uuid
from pathlib import Path
from typing import Final

from bench.rig import Rig

__all__ = ["best", "look", "run"]

WORKERS: Final = (1, 2, 4, 8)

LOOK_SECONDS: Final = 10.0
"""How long the tool may take to print its version."""

RUN_SECONDS: Final = 600.0
"""How long one import may take: the slowest, of one worker, takes about half a minute for a million records."""


def look(tool: str | None) -> tuple[tuple[int, ...], str]:
    """The numbers of workers to try, and the tool's version; or none, and the reason that it cannot be run."""
    if tool is None:
        return (), "MONGOIMPORT names no tool"
    try:
        output = _run([tool, "--version"], LOOK_SECONDS).stdout.splitlines()
    except (OSError, RuntimeError) as error:
        return (), str(error)
    return WORKERS, output[0].replace(" version:", "") if output else "of an unknown version"


def best(rig: Rig, tool: str, path: Path, candidates: tuple[int, ...], lines: int) -> int:
    """The fastest number of workers, by the median of three passes that take turns, after one to warm up."""
    run(rig, tool, path, max(candidates), lines)
    walls: dict[int, list[float]] = {workers: [] for workers in candidates}
    for workers in candidates * 3:
        walls[workers].append(run(rig, tool, path, workers, lines))
    return min(walls, key=lambda workers: statistics.median(walls[workers]))


def run(rig: Rig, tool: str, path: Path, workers: int, lines: int) -> float:
    """Wall seconds of one import. Raises RuntimeError if it takes too long, or not every line became a document."""
    name = f"i{uuid.uuid4().hex[:8]}"
    uri = rig.settings.mongo_uri.get_secret_value() if rig.settings.mongo_uri else ""
    command = [tool, f"--uri={uri}", f"--collection={name}", f"--file={path}", f"-j{workers}", "--quiet"]
    try:
        began = time.perf_counter()
        ended = _run([*command, '--writeConcern={"w":"majority"}'], RUN_SECONDS)
        seconds = time.perf_counter() - began
        documents = rig.store.data[name].count_documents({})
    finally:
        rig.store.data.drop_collection(name)
    if ended.returncode or documents != lines:
        words = (ended.stderr.strip() or "no words").splitlines()[-1]
        raise RuntimeError(f"-j{workers} ended with {ended.returncode} and {documents} of {lines} documents: {words}")
    return seconds


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    # In a session of its own, so that it can be killed with its children: the tool may be a script.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{command[0]} did not end within {seconds:g} seconds") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
