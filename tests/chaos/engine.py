"""`headrace engine` with built-in faults, which the environment selects.

CHAOS_STEP, CHAOS_NTH: crash when this step is reached for the nth time, counted over all workers.
CHAOS_FIRED: a file that is written just before the crash, or hang.
CHAOS_HANG: hang instead of crashing: "stopped" by SIGSTOP, "looping", or "blocked" in a read.
CHAOS_POISON: kill a worker that is about to decode a batch with these characters in it.
CHAOS_SLOW: seconds that a worker sleeps before it decodes a batch.
CHAOS_CLOCK: seconds by which `time.time` is off. The driver reads it for new ids; the engine itself reads no clock but
the monotonic one, as tests/unit/test_imports.py ensures.
CHAOS_CLOCK_SIGNS=1: the clock of S3 signatures is off as well.

Its application name at MongoDB is APP, so that a fail point can be limited to it.
"""

import datetime as dt
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

from engine.fleet.process import work
from engine.fleet.supervisor import Supervisor
from engine.logs import configure
from engine.settings import load
from engine.steps import on_reach

APP = "headrace under test"


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def loop():
    while True:
        pass


def block():
    os.read(os.pipe()[0], 1)


HARM = {"": crash, "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP), "looping": loop, "blocked": block}


def harm_at(step, nth, fired, harm):
    count = fired.with_suffix(".count")

    def hook(reached):
        if reached != step:
            return
        # Locked, so that no two workers get the same number; a worker that dies releases the lock.
        with count.open("ab") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)
            counter.write(b"x")
            counter.flush()
            now = counter.tell()
        if now == nth:
            fired.write_text(f"{step} {nth}")
            harm()

    on_reach(hook)


def poison(marker):
    from engine.load import pipeline

    real = pipeline.decode

    def decode(batch, *more):
        if marker in batch.data:
            crash()
        return real(batch, *more)

    pipeline.decode = decode


def slow(seconds):
    from engine.load import pipeline

    real = pipeline.decode

    def decode(*given):
        time.sleep(seconds)
        return real(*given)

    pipeline.decode = decode


def rename():
    from engine.control import store

    real = store.MongoClient
    store.MongoClient = lambda *given, **more: real(*given, **more | {"appname": APP})


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
    rename()
    if step := os.environ.get("CHAOS_STEP"):
        harm = HARM[os.environ.get("CHAOS_HANG", "")]
        harm_at(step, int(os.environ["CHAOS_NTH"]), Path(os.environ["CHAOS_FIRED"]), harm)
    if marker := os.environ.get("CHAOS_POISON"):
        poison(marker.encode())
    if seconds := float(os.environ.get("CHAOS_SLOW", "0")):
        slow(seconds)
    if off := float(os.environ.get("CHAOS_CLOCK", "0")):
        set_clock(off, os.environ.get("CHAOS_CLOCK_SIGNS") == "1")
    return Supervisor(settings, work).run()


if __name__ == "__main__":
    sys.exit(main())
