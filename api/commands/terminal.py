"""What all commands share: their settings, exit codes, and the console for tables."""

import os
import sys
from typing import Annotated, Final

import typer
from rich.console import Console

from engine.errors import SettingsError
from engine.logs import configure, get_logger
from engine.settings import Settings
from engine.settings import load as load_settings

__all__ = ["EXIT_INTERRUPTED", "EXIT_OF", "AsJson", "console", "is_live", "settings_of"]

WIDE: Final = 240
"""Columns of a table that is not printed on a terminal."""

EXIT_OF: Final = {"COMPLETED": 0, "FAILED": 3, "CANCELLED": 4}
"""Exit code of a command that has watched a job to its end, by the job's state."""

EXIT_INTERRUPTED: Final = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def settings_of(*, needs_servers: bool) -> Settings:
    """Load the settings and configure logging. Raises SettingsError, also if needed servers are not named."""
    settings, warnings = load_settings()
    configure(settings.engine_log_level, settings.engine_log_format, settings.secrets())
    for warning in warnings:
        get_logger().warning(warning, action="settings")
    if needs_servers:
        missing = []
        if settings.mongo_uri is None:
            missing.append("MONGO_URI (the MongoDB for the queue and the documents)")
        if settings.aws_bucket_name is None:
            missing.append("AWS_BUCKET_NAME (the bucket that holds the files)")
        if missing:
            raise SettingsError(f"not set: {', '.join(missing)}; set them, or run `headrace up`, which starts its own")
    return settings


def console() -> Console:
    """A console for tables on standard output; `WIDE`, so that nothing is cut, if no terminal sets the width."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(highlight=False, markup=False, emoji=False, width=wide)


def is_live(console: Console) -> bool:
    """Whether what was shown can be replaced. Unlike `console.is_terminal`, FORCE_COLOR does not change it."""
    return console.file.isatty() and not console.is_dumb_terminal
