"""The entry point of `headrace`: Ctrl-C ends it quietly from the start, even while libraries are being imported.

For that, this module itself imports only what Python has already loaded; the commands are in `api.commands`.
"""

import os
import signal
import sys

__all__ = ["main"]

EXIT_INTERRUPTED = 130  # as in `api.commands.terminal`, whose imports take too long


def _quietly() -> None:
    """Make Ctrl-C end the process at once: an exception would surface in the middle of some library."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_INTERRUPTED))


def main() -> None:
    """Run the command."""
    _quietly()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the parent closed it, and libraries write to it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (it stays open; pathlib is not loaded yet)
    command = sys.argv[1:2]
    # The supervisor handles these; before it runs, and in other servers, their default actions would end or stop the
    # process.
    ignored = [signal.SIGHUP] if command == ["engine"] else []
    ignored += [signal.SIGTTIN, signal.SIGTTOU] if command in (["engine"], ["api"], ["up"]) else []
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    from api.commands.main import main as run  # takes a second, during which the handler is in place

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        _quietly()  # only the interpreter's own shutdown is left


if __name__ == "__main__":
    main()
