"""`headrace engine` with a fault built in: a crash at the n-th time a step is reached, or a clock that is wrong.

CHAOS_STEP, CHAOS_NTH: the step and the time of it, counted over all workers. CHAOS_FIRED: a file that is written then.
CHAOS_CLOCK: seconds that every clock of this process but the monotonic one is off; CHAOS_CLOCK_SIGNS=1: also that of signatures.
"""

import datetime as dt
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

from engine.logs import configure
from engine.settings import load
from engine.steps import on_reach
from engine.supervisor import Supervisor
from engine.worker import work


def crash_at(step, nth, fired):
    counter = mmap.mmap(-1, mmap.PAGESIZE)  # shared by all workers, since it is made before they are

    def hook(reached):
        if reached == step:
            (count,) = struct.unpack_from("=q", counter)
            struct.pack_into("=q", counter, 0, count + 1)
            if count + 1 == nth:
                fired.write_text(f"{step} {nth}")
                os.kill(os.getpid(), signal.SIGKILL)

    on_reach(hook)


def set_clock(off, signs):
    real = time.time
    time.time = lambda: real() + off
    if signs:
        import botocore.auth
        import botocore.compat

        def now(remove_tzinfo=True):
            at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=off)
            return at.replace(tzinfo=None) if remove_tzinfo else at

        botocore.auth.get_current_datetime = now


def main():
    settings, _ = load()
    configure("info", "json", settings.secrets())
    if step := os.environ.get("CHAOS_STEP"):
        crash_at(step, int(os.environ["CHAOS_NTH"]), Path(os.environ["CHAOS_FIRED"]))
    if off := float(os.environ.get("CHAOS_CLOCK", "0")):
        set_clock(off, os.environ.get("CHAOS_CLOCK_SIGNS") == "1")
    return Supervisor(settings, work).run()


if __name__ == "__main__":
    sys.exit(main())
