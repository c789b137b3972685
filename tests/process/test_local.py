"""An embedded mongod: the threads of the driver that waits for it block the stop signals.

Only the main thread then receives these, and can hold them back during a fork.
"""

import signal
import subprocess
import sys

from tests.running import ROOT

SCRIPT = """
import os
from pathlib import Path

from engine.local.servers import LocalServers
from engine.settings import Settings

with LocalServers(Settings(aws_bucket_name="elsewhere"), Path("data")):
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != os.getpid():
            print(next(line.split()[1] for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk")))
"""


def test_the_threads_that_look_for_mongod_take_no_signal_that_is_held_back_in_a_fork(tmp_path):
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    blocked = [int(mask, 16) for mask in made.stdout.split()]
    assert blocked  # otherwise there are no such threads, and this proves nothing
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert all(mask >> (number - 1) & 1 for mask in blocked)
