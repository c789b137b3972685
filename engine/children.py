"""Child processes: starting one without losing it to a signal, how one ended, and having it die with this process."""

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
    """In a child: have the kernel send KILL when the parent dies, however it dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a process: TERM, INT, and HUP unless it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def before_exec() -> None:
    """For `preexec_fn`: be killed when the parent dies, and restore the default handling of the stop signals, unblocked
    even if the fork happened within `signals_blocked`."""
    be_killed_with_parent()
    # The child has the parent's handlers until it calls exec: a pending signal must not run them.
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block INT, TERM and HUP within it: an exception that a handler raises during a fork is printed there, and lost.

    A thread started within it inherits the mask for good. Every other thread that runs during such a fork must block
    these signals too: the kernel delivers a signal to any thread that does not, and Python then runs the handler in the
    main thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_name(number: int) -> str:
    """The name of a signal, or its number: most of the real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_code(process: "subprocess.Popen[bytes]") -> int | None:
    """How a child ended, in the form of `Popen.returncode`; None while it runs.

    It takes no lock. `Popen.poll` does, and an exception that a signal handler raises there may leave the lock held:
    the next wait for that child would never return.
    """
    if process.returncode is not None:
        return process.returncode
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0  # while CHLD is ignored, the kernel keeps no exit status; Popen reports 0 as well
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
