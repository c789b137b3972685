"""The command `headrace`: a Ctrl-C ends it quietly from its first moment on, while libraries are still being read.

So it imports nothing by itself but what Python has read already; the commands are in `api.commands`.
"""

import os
import signal
import sys

__all__ = ["main"]

EXIT_INTERRUPTED = 130  # as in `api.commands.terminal`, whose imports take too long


def _quietly() -> None:
    """Let a Ctrl-C end the process at once: an exception would come out of the midst of some library."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_INTERRUPTED))


def main() -> None:
    """Run the command."""
    _quietly()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it, and libraries write to it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (it stays open; pathlib is not read yet)
    if sys.argv[1:2] == ["engine"]:
        # They are for its supervisor, and would end or stop a process that is not one yet.
        for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)
    from api.commands.main import main as run  # the handler is there before a second of imports begins

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _quietly()  # what is left is the interpreter's own end


if __name__ == "__main__":
    main()
