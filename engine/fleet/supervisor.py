"""Fork workers, reap them, replace those that die or fall silent, stop them.

The supervisor touches no payload: it opens no client and starts no thread, since it forks at any time and neither
survives a fork. Signal handlers only record the signal; one loop, which wakes at least every `LOOP_SECONDS`, does
everything else.
"""

import os
import secrets
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from setproctitle import setproctitle

from engine.children import be_killed_with_parent, signal_name
from engine.fleet.heartbeat import Heartbeat
from engine.fleet.process import EXIT_AGAIN, EXIT_BOOT
from engine.fleet.worker import WorkerIdentity
from engine.logs import get_logger
from engine.settings import LOOP_SECONDS, Settings
from engine.text.encode import COMPILED

__all__ = ["Supervisor"]

Work = Callable[[Settings, WorkerIdentity, Heartbeat], int]

ASLEEP_SECONDS: Final = 5.0
"""If the loop itself did not run for longer than this (suspended, stopped), the workers' silence proves nothing."""

YOUNG_SECONDS: Final = 1.0
"""A worker that dies younger than this is replaced after a delay that doubles, unless it was killed after booting."""

MAX_DELAY_SECONDS: Final = 5.0
"""The longest delay before a worker is replaced; also the wait after a fork that failed."""

SIGNALS: Final = tuple(getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "QUIT", "HUP", "TTIN", "TTOU", "CHLD"))

log = get_logger()


@dataclass(slots=True)
class _Child:
    identity: WorkerIdentity
    heartbeat: Heartbeat
    born: float
    leaving: bool = False  # it was sent TERM or QUIT
    silent: bool = False  # killed because it did not move


@dataclass(slots=True)
class _Slot:
    """A place for one worker. `dead`: names of workers whose leases may not be freed yet; `not_before`: when it may be
    filled again, in seconds of the monotonic clock."""

    number: int
    dead: tuple[str, ...] = ()
    failures: int = 0
    not_before: float = 0.0
    pid: int | None = None


class Supervisor:
    """Keeps `engine_workers` children at work.

    Args:
        settings: those of the engine.
        work: what a child runs; its result is the child's exit code.
    """

    def __init__(self, settings: Settings, work: Work) -> None:
        self._settings = settings
        self._work = work
        self._host = socket.gethostname()
        self._boot = secrets.token_hex(4)
        self._slots: list[_Slot] = []
        self._children: dict[int, _Child] = {}  # by pid
        self._forks = 0
        self._ever_booted = False  # whether any worker has reached MongoDB
        self._signals: deque[int] = deque()  # received, but not handled yet
        self._wake = (-1, -1)  # a pipe through which a signal wakes the loop
        self._replacing: deque[int] = deque()  # pids of the workers that HUP still has to replace
        self._stopping = False
        self._deadline = 0.0  # of the stop, on the monotonic clock
        self._killed = False
        self._exit = 0

    def run(self) -> int:
        """Supervise until told to stop; returns the exit code: 0 if all workers left in time."""
        self._wake = os.pipe()
        for end in self._wake:
            os.set_blocking(end, False)
        for number in SIGNALS:
            signal.signal(number, self._note)
        setproctitle("headrace: supervisor")
        self._slots = [_Slot(number) for number in range(self._settings.engine_workers)]
        encoder = "extension" if COMPILED else "driver"
        log.info("engine starts", action="start", workers=len(self._slots), encoder=encoder, pid=os.getpid())
        away_since = time.monotonic()
        while True:
            self._handle_signals()
            self._reap()
            if self._stopping and not self._children:
                break
            now = time.monotonic()
            if now - away_since > ASLEEP_SECONDS:
                for child in self._children.values():
                    child.heartbeat.touch()
            away_since = now
            self._kill_silent()
            self._replace_next()
            self._top_up()
            self._sleep()
        log.info("engine has stopped", action="stop", exit=self._exit)
        return self._exit

    def _note(self, number: int, frame: object) -> None:
        if number != signal.SIGCHLD:
            self._signals.append(number)
        try:
            os.write(self._wake[1], b".")
        except BlockingIOError:
            pass  # the pipe is full: the loop is being woken already

    def _sleep(self) -> None:
        select.select([self._wake[0]], [], [], LOOP_SECONDS)
        try:
            while os.read(self._wake[0], 4096):
                pass
        except BlockingIOError:
            pass

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.popleft()
            if number in (signal.SIGTERM, signal.SIGINT):
                if self._stopping:
                    self._quit_all()
                else:
                    self._stop()
            elif number == signal.SIGQUIT:
                self._stop()
                self._quit_all()
            elif self._stopping:
                continue
            elif number == signal.SIGHUP:
                log.info("replacing the workers one by one", action="reload")
                self._replacing = deque(pid for pid, child in self._children.items() if not child.leaving)
            elif number == signal.SIGTTIN:
                self._slots.append(_Slot(max((slot.number for slot in self._slots), default=-1) + 1))
                log.info("one more worker", action="grow", workers=len(self._slots))
            elif number == signal.SIGTTOU and len(self._slots) > 1:
                slot = self._slots.pop()
                log.info("one worker less", action="shrink", workers=len(self._slots))
                if slot.pid is not None:
                    self._signal(slot.pid, signal.SIGTERM)
                else:
                    self._slots[0].dead += slot.dead  # the next worker there frees their leases

    def _stop(self, exit_code: int = 0) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._exit = exit_code
        self._deadline = time.monotonic() + self._settings.engine_grace_seconds
        log.info("engine stops", action="stop", workers=len(self._children))
        for pid in self._children:
            self._signal(pid, signal.SIGTERM)

    def _signal(self, pid: int, number: int) -> None:
        """Tell a child to leave: gracefully with TERM, at once with QUIT."""
        child = self._children.get(pid)
        if child is None:
            return
        child.leaving = True
        # A pid is not reused before it is reaped, so it cannot have become another process.
        os.kill(pid, number)

    def _quit_all(self) -> None:
        for pid in self._children:
            self._signal(pid, signal.SIGQUIT)
        self._deadline = min(self._deadline, time.monotonic() + 1.0)

    def _kill_silent(self) -> None:
        if self._stopping and time.monotonic() >= self._deadline:
            for pid in list(self._children):
                if not self._killed:
                    log.warning("worker did not stop in time and is killed", action="kill", worker_pid=pid)
                    self._exit = self._exit or 1
                os.kill(pid, signal.SIGKILL)
            self._killed = True
            return
        for pid, child in self._children.items():
            silent = child.heartbeat.age()
            if silent > self._settings.engine_watchdog_seconds - LOOP_SECONDS:
                log.error(
                    "worker made no progress and is killed",
                    action="kill",
                    worker=child.identity.name,
                    silent=round(silent, 1),
                )
                if self._stopping:
                    self._exit = self._exit or 1
                child.heartbeat.touch()
                child.silent = True
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (child := self._children.pop(pid, None)) is not None:
                self._bury(pid, child, os.waitstatus_to_exitcode(status))

    def _bury(self, pid: int, child: _Child, code: int) -> None:
        slot = next((slot for slot in self._slots if slot.pid == pid), None)
        booted, age = child.heartbeat.booted(), time.monotonic() - child.born
        self._ever_booted |= booted or any(other.heartbeat.booted() for other in self._children.values())
        # The successor frees the leases of these names. A worker that has not booted holds none itself.
        names = () if child.heartbeat.released() else child.identity.predecessors
        names += (child.identity.name,) if booted and code != 0 else ()
        child.heartbeat.close()
        if slot is None and self._slots:
            # Its slot is gone (TTOU): the next worker in the first slot frees what it held.
            self._slots[0].dead += names
        if slot is not None:
            slot.pid = None
            slot.dead += names
            lasted = age >= YOUNG_SECONDS and code != EXIT_AGAIN  # a futile search for credentials takes seconds
            # A worker that booted and then exited at once by itself, perhaps for want of a thread, is no better than
            # one that has not booted.
            killed = booted and code < 0
            slot.failures = 0 if killed or code == 0 or lasted else slot.failures + 1
            if slot.failures > 1:
                slot.not_before = time.monotonic() + min(0.1 * 2 ** min(slot.failures, 10), MAX_DELAY_SECONDS)
        if code == 0 or self._stopping:
            log.debug("worker has exited", action="reap", worker=child.identity.name, exit=code)
        elif code == EXIT_BOOT and not self._ever_booted:
            log.error("a worker cannot start, so the engine stops", action="stop", worker=child.identity.name)
            self._stop(1)
        else:
            cause = "killed because it made no progress" if child.silent else _cause(code)
            log.warning("worker died and is replaced", action="reap", worker=child.identity.name, cause=cause)

    def _replace_next(self) -> None:
        """For HUP: replace one worker at a time, the next only when every slot is filled by one that has booted."""
        if not self._replacing or self._stopping:
            return
        standing = (self._children.get(slot.pid or 0) for slot in self._slots)
        if not all(child is not None and not child.leaving and child.heartbeat.booted() for child in standing):
            return
        # Once it has gone, a successor fills its slot, and frees its leases at once if it did not leave gracefully.
        self._signal(self._replacing.popleft(), signal.SIGTERM)

    def _top_up(self) -> None:
        if self._stopping:
            return
        for slot in self._slots:
            if slot.pid is None and time.monotonic() >= slot.not_before:
                self._fork(slot)

    def _fork(self, slot: _Slot) -> None:
        self._forks += 1
        identity = WorkerIdentity(self._host, self._boot, slot.number, self._forks, slot.dead, os.getpid())
        _flush()
        # A signal between the fork and the child's own handlers would be recorded in a queue that nobody reads.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            heartbeat = Heartbeat()
            pid = os.fork()
        except OSError as error:
            log.error(
                "a worker cannot be started at present: check the free memory and the limit on processes",
                action="fork",
                worker=identity.name,
                cause=error.strerror,
            )
            slot.not_before = time.monotonic() + MAX_DELAY_SECONDS
            return
        else:
            if pid == 0:
                self._be_child(identity, heartbeat, blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        slot.pid, slot.dead = pid, ()
        self._children[pid] = _Child(identity, heartbeat, time.monotonic())

    def _be_child(self, identity: WorkerIdentity, heartbeat: Heartbeat, blocked: set[int | signal.Signals]) -> None:
        """Run the child. Never returns, so that no code of the supervisor runs twice."""
        code = 1
        try:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            for end in self._wake:
                os.close(end)
            be_killed_with_parent()
            if os.getppid() != identity.parent:
                os._exit(1)  # the supervisor died before prctl took effect
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            code = self._work(self._settings, identity, heartbeat)
        except BaseException:
            log.exception("worker failed", action="crash", worker=identity.name)
        finally:
            try:
                _flush()
            finally:
                os._exit(code)


def _flush() -> None:
    """Flush the output buffers, which a fork would duplicate. If the log cannot be written, work continues."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal_name(-code)
    return f"{name} (perhaps out of memory)" if name == "SIGKILL" else name
