"""The HTTP API and the command line."""

import os
import signal

__all__ = ["main"]

EXIT_INTERRUPTED = 130


def main() -> None:
    """The command `headrace`: a Ctrl-C ends it quietly from its first moment on, while libraries are still being read."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_INTERRUPTED))
    from api.cli import main as run  # the handler is there before a second of imports begins

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
