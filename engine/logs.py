"""Logging through structlog: readable on a terminal, JSON lines elsewhere, always on standard error.

Every line carries action, job, range and worker. Secrets passed to `configure` are never written.
"""

import logging
import os
import re
import select
import signal
import stat
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

import structlog

from engine.errors import HeadraceError, Unexpected

__all__ = ["configure", "get_logger", "mask", "printable", "printable_lines", "unexpected_translated"]

MASK: Final = "***"

FULL_SECONDS: Final = 0.2
"""How long a log line waits for room in a full pipe. Then it is dropped, and so are all further ones, without waiting,
until there is room again."""

CONTEXT: Final = ("action", "job", "range", "worker")

# In a MongoDB URI everything up to the last @ is masked: a password may contain characters that should have been
# percent-encoded. A scheme's length is bounded, or text without spaces would be scanned to its end for each word.
_CREDENTIALS: Final = re.compile(r"(\bmongodb(?:\+srv)?://)\S+@|(\b[a-z][a-z0-9+.-]{0,31}://)[^\s/@]+@", re.IGNORECASE)
_secrets: list[str] = []


def mask(text: str) -> str:
    """The text with its secrets masked: those passed to `configure`, and the user and password of any URI."""
    for secret in _secrets:
        text = text.replace(secret, MASK)
    return _CREDENTIALS.sub(lambda found: f"{found[1] or found[2]}{MASK}@", text)


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    # Any other value would be rendered as its repr, which may contain a secret.
    return value if value is None or isinstance(value, bool | int | float) else mask(repr(value))


def _mask_all(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    # Keys with a leading underscore are internal to structlog.
    return {key: value if key.startswith("_") else _masked(value) for key, value in event.items()}


def _fill(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in CONTEXT:
        event.setdefault(name, None)
    return event


def printable(text: str) -> str:
    """The text with control characters escaped, so that a file's content or name cannot control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """`printable` applied line by line: newlines are kept."""
    return "\n".join(map(printable, text.split("\n")))


def _harmless(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    # Any client can put control characters into a path that is logged. A traceback keeps its lines.
    return {key: printable_lines(value) if isinstance(value, str) else value for key, value in event.items()}


def _drop_empty(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: value for key, value in event.items() if value is not None}


class _Output:
    """Standard error. If it is a pipe that nobody reads, lines are dropped, so that logging never blocks the work.

    The pipe is reopened: O_NONBLOCK on the inherited file descriptor would apply to every process that shares it.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._pipe: int | None = None
        self._full = False
        self._cut = False
        try:
            number = self._stream.fileno()
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                self._pipe = os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            pass  # not a pipe, or one that cannot be reopened

    def write(self, text: str) -> None:
        """Write a line, or drop it."""
        if self._pipe is None:
            with _as_in_the_foreground():
                self._stream.write(text)
                self._stream.flush()
            return
        left = text.encode(errors="backslashreplace")
        if self._cut:
            left = b"\n" + left  # ends the line that was cut off
        begun = False
        while left:
            _, ready, _ = select.select([], [self._pipe], [], 0 if self._full else FULL_SECONDS)
            self._full = not ready
            if not self._full:
                try:
                    left = left[os.write(self._pipe, left) :]
                    begun = True
                    continue
                except BlockingIOError:
                    self._full = True
            self._cut |= begun
            return
        self._cut = False

    def flush(self) -> None:
        """Do nothing: `write` leaves nothing buffered."""


@contextmanager
def _as_in_the_foreground() -> Iterator[None]:
    """Block TTOU, which a terminal with `tostop` sends to a background process that writes to it. In a process with a
    handler for it, such as the supervisor, the same write would be repeated for ever; with the signal blocked, the
    terminal accepts it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def configure(level: str = "info", format: str = "auto", secrets: Iterable[str] = ()) -> None:
    """Set up logging for this process and those it forks.

    Args:
        level: debug, info, warning or error.
        format: text, json, or auto: text if standard error is a terminal.
        secrets: values that must never be shown.
    """
    # Longest first: a URI must be masked before the password within it.
    _secrets[:] = sorted({secret for secret in secrets if len(secret) >= 3}, key=len, reverse=True)
    text = format == "text" or (format == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _fill,
        _mask_all,
    ]
    if text:
        last: list[Any] = [_drop_empty, _harmless, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    else:
        last = [structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(_Output())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("botocore", "boto3", "urllib3", "pymongo", "s3transfer", "waitress", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def get_logger() -> structlog.stdlib.BoundLogger:
    """A logger; give each line an `action`, and `job`, `range`, `worker` where they are known."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("headrace")
    return logger


@contextmanager
def unexpected_translated(doing: str) -> Iterator[None]:
    """Log any exception that is not a HeadraceError and raise it as Unexpected; `doing` says what was being done."""
    try:
        yield
    except HeadraceError:
        raise
    except Exception as error:
        get_logger().exception("unexpected error", action="crash", doing=doing)
        raise Unexpected(
            f"{type(error).__name__} while {doing}: the engine's log says where; it is retried a few times"
        ) from error
