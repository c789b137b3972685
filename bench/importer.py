"""The database's own import tool, for comparison in the report. A failure of it costs only its own figures."""

import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Final

from bench.rig import Rig

__all__ = ["WORKERS", "best", "look", "run"]

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
    """The fastest number of workers, by the median of three passes that take turns, after one to warm up.

    A number with which the tool fails is not tried again. Raises RuntimeError or OSError, as `run` does, if it fails
    with all of them.
    """
    walls: dict[int, list[float]] = {workers: [] for workers in candidates}
    failed: dict[int, OSError | RuntimeError] = {}
    for turn, workers in enumerate((max(candidates), *candidates * 3)):
        if workers in failed:
            continue
        try:
            seconds = run(rig, tool, path, workers, lines)
        except (OSError, RuntimeError) as error:
            failed[workers] = error
            print(f"import tool: {error}", file=sys.stderr, flush=True)
            continue
        print(f"import tool, -j{workers}: {seconds:.1f} s", flush=True)
        if turn:
            walls[workers].append(seconds)
    medians = {workers: statistics.median(taken) for workers, taken in walls.items() if workers not in failed}
    if not medians:
        raise failed[max(candidates)]
    return min(medians, key=medians.__getitem__)


def run(rig: Rig, tool: str, path: Path, workers: int, lines: int) -> float:
    """Wall seconds of one import. Raises RuntimeError if it takes too long, or not every line became a document."""
    name = f"i{uuid.uuid4().hex[:8]}"
    uri = rig.settings.mongo_uri.get_secret_value() if rig.settings.mongo_uri else ""
    command = [tool, f"--uri={uri}", f"--collection={name}", f"--file={path}", f"-j{workers}"]
    try:
        began = time.perf_counter()
        ended = _run([*command, '--writeConcern={"w":"majority"}'], RUN_SECONDS)
        seconds = time.perf_counter() - began
        documents = rig.store.data[name].count_documents({})
    finally:
        rig.store.data.drop_collection(name)
    if ended.returncode or documents != lines:
        raise RuntimeError(
            f"-j{workers} ended with {ended.returncode} and {documents} of {lines} documents: {_reason(ended.stderr)}"
        )
    return seconds


def _reason(words: str) -> str:
    """Why the tool failed, of all that it says: it goes on with how many documents it imported."""
    told = [line for line in words.splitlines() if line.strip()] or ["no words"]
    return next((line for line in told if "Failed:" in line), told[-1]).strip()


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
