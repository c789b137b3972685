"""Child processes: how they start without being lost, tell how they ended, and die with this process."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["be_killed_with_parent", "before_exec", "exit_code", "signal_name", "signals_blocked", "stop_signals"]

_PR_SET_PDEATHSIG: Final = 1
_BLOCKED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def be_killed_with_parent() -> None:
    """In a child: be killed when the parent dies, however it dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_signals() -> tuple[signal.Signals, ...]:
    """What ends a process: TERM, INT, and HUP unless it is ignored, as nohup asks for."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def before_exec() -> None:
    """For `preexec_fn`: be killed when the parent dies, and take signals as any program does, also where the fork was made within
    `signals_blocked`."""
    be_killed_with_parent()
    # What came for the parent's handlers, which are here as well for a moment, must not be handled here.
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Within it, INT, TERM and HUP wait: an exception that a handler raises in the midst of a fork is printed there, and lost.

    A thread that is started within it holds them back for good, as must all that run beside such a fork: the kernel gives a
    signal to any thread that does not, and Python then runs its handler in the main thread all the same.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_name(number: int) -> str:
    """What a signal is called; most of the real-time ones have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_code(process: "subprocess.Popen[bytes]") -> int | None:
    """How a child ended, as `Popen.returncode` tells it; None while it runs.

    It takes no lock. `Popen.poll` does, and an exception that the handler of a signal raises there may leave it taken: whoever
    waits for that child then waits for ever.
    """
    if process.returncode is not None:
        return process.returncode
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0  # where CHLD is ignored, the kernel keeps nothing of it; Popen says the same
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
