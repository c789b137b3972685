"""For suites with real processes: run and kill `headrace` commands, wait for conditions, make MongoDB commands fail."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from pymongo.errors import ConnectionFailure

from engine.children import before_exec
from engine.errors import Transient

ROOT = Path(__file__).parents[1]


def children(pid):
    """The pids of a process's children."""
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def until(true, seconds=60, what="it"):
    """Wait until `true()` returns something truthy, and return it; after `seconds` the test fails."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {seconds} seconds")
        time.sleep(0.05)
    return found


def patiently(ask, seconds=60):
    """Call `ask`, again for up to `seconds` while the database is away or changes; returns its result."""
    end = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except (Transient, ConnectionFailure):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@contextmanager
def failing(client, commands, mode="alwaysOn", app="headrace", **how):
    """Within it, these commands of an application fail, or are delayed, on the server as `how` says.

    Yields a list, to which the number of affected commands is appended at the end.
    """
    came = []
    data = {"failCommands": commands, "appName": app} | how
    # `count` is a total since the server started, over all earlier uses.
    on = client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
    try:
        yield came
    finally:
        off = client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
        came.append(off["count"] - on["count"])


def taking(milliseconds):
    """The `how` of `failing` that delays each command by this long."""
    return {"blockConnection": True, "blockTimeMS": milliseconds}


def _as_anywhere():
    """For `preexec_fn`: as `before_exec`, but HUP is not ignored, even if the tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before_exec()


class Running:
    """A `headrace` command in a process of its own: `engine` or `api`."""

    def __init__(self, command, settings, log, module="api.cli", output=None, **changes):
        given = {name: getattr(settings, name) for name in ("aws_access_key_id", "aws_endpoint_url", "aws_bucket_name")}
        given |= {name: getattr(settings, name).get_secret_value() for name in ("mongo_uri", "aws_secret_access_key")}
        given |= {"engine_control_db": settings.engine_control_db, "engine_workers": 2, "engine_log_format": "json"}
        environment = {name.upper(): str(value) for name, value in (given | changes).items()}
        self.log = log
        with log.open("wb") as file:
            output = file if output is None else output
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, command],
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_as_anywhere,
            )
        self.pid = self.process.pid

    def lines(self):
        """The JSON lines of the log."""
        whole = self.log.read_text().rpartition("\n")[0]  # the last line may be half written
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def workers(self):
        return [pid for pid in children(self.pid) if alive(pid)]

    def ready(self, count):
        """Wait until `count` workers have booted since the start, replaced ones included."""
        until(lambda: self._booted() >= count, what=f"boot number {count}")

    def _booted(self):
        return sum(line["event"] == "worker is ready" for line in self.actions("boot"))

    def actions(self, name):
        return [line for line in self.lines() if line["action"] == name]

    def stop(self, number=signal.SIGTERM, seconds=60):
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def end(self):
        """Kill it, whatever state it is in; on return, neither it nor any of its children is left."""
        pids = [self.pid, *children(self.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        until(lambda: not any(map(alive, pids)), what="the end of all processes")


def title(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""
