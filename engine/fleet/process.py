"""A worker process from its fork to its exit code: signals, names, errors."""

import os
import signal
import threading
from queue import SimpleQueue
from typing import Final

from setproctitle import setproctitle

from engine.errors import Permanent, StartError, Transient
from engine.fleet.heartbeat import Heartbeat
from engine.fleet.memory import tune
from engine.fleet.worker import EXIT_NOW, Worker, WorkerIdentity
from engine.logs import get_logger
from engine.settings import Settings

__all__ = ["EXIT_AGAIN", "EXIT_BOOT", "work"]

EXIT_BOOT: Final = 3
"""This worker can never boot: the supervisor stops the engine, unless a worker has booted before."""

EXIT_AGAIN: Final = 5
"""This worker could not create its clients, for a reason that may pass."""

log = get_logger()


def work(settings: Settings, identity: WorkerIdentity, heartbeat: Heartbeat) -> int:
    """Work until told to stop; returns the exit code. TERM, even repeated, stops gracefully; QUIT stops at once."""
    stop = threading.Event()
    signals: SimpleQueue[int] = SimpleQueue()

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGQUIT:
            os._exit(EXIT_NOW)
        # The event is not set here: this thread may be waiting for it, and hold its lock.
        signals.put(number)

    def set_when_told() -> None:
        signals.get()
        stop.set()

    threading.Thread(target=set_when_told, name="stop", daemon=True).start()
    # A terminal or a service manager may signal all processes, but only the supervisor decides about its workers. TERM
    # may come twice: from the service manager and from the supervisor.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGQUIT, handle)
    tune()
    setproctitle(f"headrace: worker {identity.slot} starting")
    try:
        return Worker(settings, identity, heartbeat, stop).loop()
    except (StartError, Permanent) as error:
        log.error(str(error), action="boot", worker=identity.name)
        return EXIT_BOOT
    except Transient as error:
        # Without clients a worker can do nothing; its successor may have better luck.
        log.error(str(error), action="boot", worker=identity.name)
        return EXIT_AGAIN
