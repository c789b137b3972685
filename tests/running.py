"""Commands of Headrace as processes of their own, for the suites that kill them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine.children import before_exec

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


def until(true, seconds=30, what="it"):
    """Wait for something to become true; fails loudly, never passes silently."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within {seconds} seconds")


@contextmanager
def failing(client, commands, mode="alwaysOn", app="headrace", **how):
    """While it lasts, these commands of an application fail on the server as `how` says; yields a list that holds how often, at
    its end."""
    came = []
    data = {"failCommands": commands, "appName": app} | how
    # Counted from the start of the server, over all that came before.
    on = client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
    try:
        yield came
    finally:
        off = client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
        came.append(off["count"] - on["count"])


def taking(milliseconds):
    """How a command fails that takes so long."""
    return {"blockConnection": True, "blockTimeMS": milliseconds}


def _as_anywhere():
    """In a child: HUP is not ignored, as it would be where the tests are run under nohup."""
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
        """The log, line by line."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def workers(self):
        return [pid for pid in children(self.pid) if alive(pid)]

    def ready(self, count):
        """Wait until so many workers in all have booted."""
        until(lambda: self._booted() >= count, what=f"boot number {count}")

    def _booted(self):
        return sum(line["event"] == "worker is ready" for line in self.actions("boot"))

    def actions(self, name):
        return [line for line in self.lines() if line["action"] == name]

    def stop(self, number=signal.SIGTERM, seconds=25):
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def end(self):
        """Whatever state it is in: nothing of it is left when this returns."""
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
