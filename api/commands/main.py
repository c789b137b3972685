"""The commands of `headrace` that run or inspect its parts on this machine; those that call the API are in `remote`.

Exit codes: 0 done; 1 it could not be done; 2 wrong usage; 3 the job FAILED; 4 it was CANCELLED; 130 interrupted.
"""

import errno
import io
import os
import re
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from dotenv import dotenv_values
from pydantic import SecretStr
from rich.table import Table

from api.auth import NAME, draw
from api.commands.remote import remote
from api.commands.show import plainly, print_json
from api.commands.terminal import AsJson, console, settings_of
from api.operations import Scope
from engine.errors import HeadraceError
from engine.logs import configure, get_logger, mask
from engine.settings import Settings

__all__ = ["app", "main"]

app = typer.Typer(
    name="headrace",
    help="Turns huge line-oriented files in S3 into MongoDB documents.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def up(
    file: Annotated[Path | None, typer.Option(help="Load this file instead of the sample.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Exit after the job, with 0 if it completed.")] = False,
    records: Annotated[int, typer.Option(min=0, help="Records in the sample; 0 loads nothing.")] = 200_000,
) -> None:
    """Start real servers, the engine and the API; load a file; keep serving."""
    from api.commands.up import up as run

    settings = settings_of(needs_servers=False)
    raise typer.Exit(run(settings, file, once, records))


@app.command()
def engine() -> None:
    """Run the workers on this machine, against MONGO_URI and the bucket."""
    from engine.fleet.process import work
    from engine.fleet.supervisor import Supervisor

    settings = settings_of(needs_servers=True)
    raise typer.Exit(Supervisor(settings, work).run())


@app.command()
def api() -> None:
    """Run the HTTP API on this machine, against MONGO_URI and the bucket."""
    from api.server import serve

    code = serve(settings_of(needs_servers=True))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for an S3 that does not answer would keep the process alive for a minute


app.add_typer(remote)


@app.command()
def config(as_json: AsJson = False) -> None:
    """Show each setting, its value and where it came from; secrets are masked."""
    settings = settings_of(needs_servers=False)
    environment = {name.upper() for name, value in os.environ.items() if value}
    in_file = {name.upper() for name, value in dotenv_values(".env").items() if value}
    rows = []
    for field in Settings.model_fields:
        name, value = field.upper(), getattr(settings, field)
        origin = "environment" if name in environment else ".env" if name in in_file else "default"
        shown = None if value is None else "***" if isinstance(value, SecretStr) else mask(str(value))
        if name == "MONGO_URI" and value is not None:
            shown = _without_secrets(value.get_secret_value())
        rows.append({"name": name, "value": shown, "from": origin})
    if as_json:
        print_json(rows)
        return
    table = Table("setting", "value", "from")
    for row in rows:
        table.add_row(str(row["name"]), row["value"] if row["value"] is not None else "–", str(row["from"]))
    console().print(table)


def _without_secrets(uri: str) -> str:
    """A MongoDB URI, masked: everything before the @, and the values of options that may hold a secret."""
    uri = re.sub(r"(?<=://).*@", "***@", uri, flags=re.DOTALL)
    return re.sub(r"(?i)([?&;][^=&;]*(?:password|properties|token|secret)[^=&;]*=)[^&;]*", r"\1***", uri)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what a load needs: settings, servers, disk and clock; exits with 1 if something is wrong."""
    from api.commands.doctor import examine

    settings = settings_of(needs_servers=False)
    findings = []
    for found in examine(settings):
        findings.append(found)
        if not as_json:
            print(f"{found.state:<8} {found.what:<10} {found.message}", flush=True)  # some take a while
    if as_json:
        print_json([asdict(found) for found in findings])
    raise typer.Exit(1 if any(found.state == "wrong" for found in findings) else 0)


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Name of its owner, kept in its entry.")],
    scope: Annotated[list[Scope], typer.Option(help="What it may do; can be given several times.")],
    as_json: AsJson = False,
) -> None:
    """Create a token for the API, and its entry for API_TOKENS. The token is shown only once."""
    if not NAME.fullmatch(name):
        raise typer.BadParameter(
            "a token's name has up to 64 letters, digits, dots, dashes and underscores", param_hint="NAME"
        )
    secret, entry = draw(name, scope)
    if as_json:
        print_json({"token": secret, "entry": entry})
    else:
        print(f"API_TOKEN={secret}    # for the client\nAPI_TOKENS={entry}    # for the API; separate more by spaces")


def _version(asked: bool) -> None:
    if asked:
        try:
            print(f"headrace {version('headrace')}")
        except PackageNotFoundError:
            print("headrace (not installed)")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run a command. An error that a user can cause ends in a sentence and exit code 1, or 2 for wrong usage."""
    configure()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name may not be valid text, and a terminal's encoding may lack characters.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a failure can still be reported
    except HeadraceError as error:
        plainly(str(error))
        sys.exit(1)
    except UnicodeEncodeError:
        plainly("an argument is not valid UTF-8: write keys, ids and collection names in UTF-8")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed it.
        _drop_output()
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 (the user sees a sentence, whatever it is)
        get_logger().debug("the command failed", action="command", exc_info=error)
        message = f"something unexpected happened ({type(error).__name__}): set ENGINE_LOG_LEVEL=debug to see where"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _drop_output()
            message = "there is no room for the output: free some, or write it elsewhere"
        plainly(message)
        sys.exit(1)


def _drop_output() -> None:
    """Discard standard output from now on: writing what is left in its buffer would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
