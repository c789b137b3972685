"""The commands of `headrace`: the only place that wires everything together.

Exit codes: 0 done; 1 it could not be done; 2 wrong usage; 3 the job FAILED; 4 it was CANCELLED; 130 interrupted.
"""

import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer
from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from api.auth import draw
from api.client import Client, check_file, reachable
from api.loader import EXIT_INTERRUPTED, Loader
from api.models import ProcessRequest
from api.operations import Scope
from api.show import (
    job_lines,
    jobs_table,
    plainly,
    print_json,
    profile_table,
    watch,
    workers_table,
)
from engine.admission import check_collection_name
from engine.errors import HeadraceError, SettingsError, StartError
from engine.logs import configure, get_logger, mask
from engine.settings import Settings
from engine.settings import load as load_settings

__all__ = ["app", "main"]

EXIT_OF: Final = {"COMPLETED": 0, "FAILED": 3, "CANCELLED": 4}
TOP_SECONDS: Final = 1.0
WIDE: Final = 240

app = typer.Typer(
    name="headrace",
    help="Turns huge line-oriented files in S3 into MongoDB documents.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Url = Annotated[str | None, typer.Option(help="Of the API; default: API_URL, or this machine and PORT.")]
JobId = Annotated[str, typer.Argument(help="Id of the job.")]


def _settings(*, needs_servers: bool) -> Settings:
    settings, warnings = load_settings()
    configure(settings.engine_log_level, settings.engine_log_format, settings.secrets())
    for warning in warnings:
        get_logger().warning(warning, action="settings")
    if needs_servers:
        missing = []
        if settings.mongo_uri is None:
            missing.append("MONGO_URI (the MongoDB that keeps the queue and takes the documents)")
        if settings.aws_bucket_name is None:
            missing.append("AWS_BUCKET_NAME (the bucket that holds the files)")
        if missing:
            raise SettingsError(f"not set: {', '.join(missing)}; set them, or run `headrace up` for servers of its own")
    return settings


def _console() -> Console:
    """Standard output for tables: wide enough, where no terminal sets the width, that nothing is cut."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(highlight=False, width=wide)


def _client(url: str | None) -> Client:
    settings = _settings(needs_servers=False)
    token = settings.api_token.get_secret_value() if settings.api_token else None
    return Client(url or settings.api_url or f"http://{reachable(settings.api_host)}:{settings.port}", token)


@app.command()
def up(
    file: Annotated[Path | None, typer.Option(help="Load this file instead of the sample.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Exit after the job: 0 if it completed.")] = False,
    records: Annotated[int, typer.Option(min=1, help="Records of the sample.")] = 200_000,
) -> None:
    """Start real servers, the engine and the API; load a file; go on serving."""
    from api.up import up as run

    settings = _settings(needs_servers=False)
    raise typer.Exit(run(settings, file, once, records))


@app.command()
def engine() -> None:
    """Run the workers, here, against MONGO_URI and the bucket."""
    from engine.supervisor import Supervisor
    from engine.worker import work

    settings = _settings(needs_servers=True)
    raise typer.Exit(Supervisor(settings, work).run())


@app.command()
def api() -> None:
    """Run the HTTP API, here, against MONGO_URI and the bucket."""
    from api.server import serve

    raise typer.Exit(serve(_settings(needs_servers=True)))


@app.command()
def load(
    files: Annotated[list[str], typer.Argument(help="Files, s3://bucket/key for objects, - for standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Watch the jobs to their end.")] = False,
    collection: Annotated[str, typer.Option(help="Takes the documents.")] = "records",
    format: Annotated[str, typer.Option(help="auto, ndjson or text.")] = "auto",
    max_errors: Annotated[str, typer.Option(help="A count, or a percentage such as 2%.")] = "1000",
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    validate: Annotated[bool, typer.Option("--validate", help="Read and judge, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Load a second copy of what is loaded.")] = False,
    skip_loaded: Annotated[bool, typer.Option("--skip-loaded", help="Skip what is loaded already.")] = False,
    through_api: Annotated[bool, typer.Option("--through-api", help="Upload through the API, not to S3.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload files and process them. Run it again after an interruption, and it goes on where it was."""
    budget: Any = int(max_errors) if max_errors.isdecimal() else max_errors
    options = {"collection": collection, "format": format, "maxErrors": budget, "priority": priority}
    options |= {"validate": validate, "force": force, "ifLoaded": "skip" if skip_loaded else "load"}
    client = _client(url)
    _check_options(options)
    for file in files:
        if file != "-" and not file.startswith("s3://"):
            check_file(Path(file))
    loads = Loader(client, options, wait=wait, through_api=through_api).run(files)
    if as_json:
        print_json([load.told() for load in loads])
    elif not wait:
        for load in loads:
            if load.job_id is not None:
                print(load.job_id)
    exits = [0]
    for load in loads:
        if load.error is not None:
            plainly(StartError(f"{load.file}: {load.error}"))
            exits.append(1)
        elif load.status is not None:
            exits.append(EXIT_OF.get(load.status["status"], 0))
            if load.status["error"]:
                plainly(StartError(f"{load.file}: {load.status['error']['message']}"))
    raise typer.Exit(max(exits))


def _check_options(options: dict[str, Any]) -> None:
    """Raises StartError for what the API would not take: before a file is uploaded for nothing."""
    try:
        check_collection_name(ProcessRequest.model_validate(options).collection)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg'].removeprefix('Value error, ')}" for f in error.errors()]
        raise StartError("; ".join(faults)) from None


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help="PENDING, PROCESSING, COMPLETED, FAILED or CANCELLED.")] = None,
    file: Annotated[str | None, typer.Option(help="Only jobs of this key.")] = None,
    collection: Annotated[str | None, typer.Option(help="Only jobs of this collection.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most to show.")] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    asked = {"status": status.upper() if status else None, "file": file, "collection": collection, "limit": limit}
    page = _client(url).ask("GET", "/jobs", params={name: value for name, value in asked.items() if value is not None})
    if as_json:
        print_json(page)
    else:
        _console().print(jobs_table(page["jobs"]))


@app.command(name="status")
def show_status(
    job_id: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it to its end.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show a job, and exit as it ended."""
    client = _client(url)
    if wait:
        try:
            watch(client, job_id, Console(highlight=False, stderr=True))
        except KeyboardInterrupt:
            print(f"headrace: the job goes on: `headrace status {job_id} --wait`", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    told = client.ask("GET", f"/jobs/{quote(job_id, safe='')}")
    if as_json:
        print_json(told)
    else:
        print("\n".join(job_lines(told)))
    raise typer.Exit(EXIT_OF.get(told["status"], 0))


def _act(job_id: str, what: str, url: str | None, as_json: bool) -> None:
    told = _client(url).ask("POST", f"/jobs/{quote(job_id, safe='')}/{what}")
    if as_json:
        print_json(told)
    else:
        print("\n".join(job_lines(told)))


@app.command()
def cancel(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a job; what was written stays."""
    _act(job_id, "cancel", url, as_json)


@app.command()
def retry(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Work again on the ranges of a job that are not done."""
    _act(job_id, "retry", url, as_json)


@app.command()
def rejects(
    job_id: JobId,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the raw lines to this file, to mend and load again; - for standard output."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The most to show.")] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show the lines that did not become documents."""
    client = _client(url)
    if out == Path("-"):
        for piece in client.rejected(job_id):
            sys.stdout.buffer.write(piece)
        return
    if out is not None:
        size = 0
        part = out.with_name(f"{out.name}.part")  # what is there stays until all of it has come
        try:
            with part.open("wb") as file:
                for piece in client.rejected(job_id):
                    size += file.write(piece)
            part.replace(out)
        except OSError as error:
            raise StartError(f"{out} cannot be written: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        if as_json:
            print_json({"out": str(out), "bytes": size})
        else:
            print(f"{out}: {size:,} bytes")
        return
    page = client.ask("GET", f"/jobs/{quote(job_id, safe='')}/rejects", params={"limit": limit})
    if as_json:
        print_json(page)
        return
    table = Table("line", "byte", "reason", "detail", "raw")
    for reject in page["rejects"]:
        cells = (
            str(reject["line"] or ""),
            str(reject["offset"]),
            reject["reason"],
            reject["detail"],
            reject["raw"][:80],
        )
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    _console().print(table)


def _queue(what: str, url: str | None, as_json: bool) -> None:
    told = _client(url).ask("POST", f"/queue/{what}")
    if as_json:
        print_json(told)
    else:
        print("paused" if told["paused"] else "running")


@app.command()
def pause(url: Url = None, as_json: AsJson = False) -> None:
    """Begin no more ranges until the queue is resumed."""
    _queue("pause", url, as_json)


@app.command()
def resume(url: Url = None, as_json: AsJson = False) -> None:
    """Go on after a pause."""
    _queue("resume", url, as_json)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Show it once.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Watch the workers: their jobs, ranges, rates and memory."""
    client = _client(url)
    if as_json:
        print_json(client.ask("GET", "/workers"))
        return
    console = _console()
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(workers_table(client.ask("GET", "/workers")["workers"]), refresh=True)
                if once or not console.is_terminal:
                    return
                time.sleep(TOP_SECONDS)
    except KeyboardInterrupt:
        pass


@app.command()
def profile(url: Url = None, as_json: AsJson = False) -> None:
    """Show where the time of the live workers went, stage by stage."""
    workers = _client(url).ask("GET", "/workers")["workers"]
    if as_json:
        print_json({"workers": workers})
    else:
        _console().print(profile_table(workers))


@app.command()
def config(as_json: AsJson = False) -> None:
    """Show each setting, its value and where it came from; secrets are masked."""
    settings = _settings(needs_servers=False)
    environment = {name.upper() for name, value in os.environ.items() if value}
    in_file = {name.upper() for name, value in dotenv_values(".env").items() if value}
    rows = []
    for field in Settings.model_fields:
        name, value = field.upper(), getattr(settings, field)
        origin = "environment" if name in environment else ".env" if name in in_file else "default"
        shown = None if value is None else "***" if isinstance(value, SecretStr) else mask(str(value))
        rows.append({"name": name, "value": shown, "from": origin})
    if as_json:
        print_json(rows)
        return
    table = Table("setting", "value", "from")
    for row in rows:
        table.add_row(str(row["name"]), row["value"] if row["value"] is not None else "–", str(row["from"]))
    _console().print(table)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at everything that a load needs; exit 1 where something is wrong."""
    from api.doctor import examine

    settings = _settings(needs_servers=False)
    findings = list(examine(settings))
    if as_json:
        print_json([{"what": f.what, "state": f.state, "said": f.said} for f in findings])
    else:
        for found in findings:
            print(f"{found.state:<8} {found.what:<10} {found.said}")
    raise typer.Exit(1 if any(found.state == "wrong" for found in findings) else 0)


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Whose it is; it shows in no log but the name does.")],
    scope: Annotated[list[Scope], typer.Option(help="What it may do; may be given several times.")],
    as_json: AsJson = False,
) -> None:
    """Draw a token for the API, and the entry of API_TOKENS that accepts it. The token is shown here and nowhere else."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not name.isascii() or len(name) > 64:
        raise SettingsError("a token's name has up to 64 letters, digits, dots, dashes and underscores")
    secret, entry = draw(name, scope)
    if as_json:
        print_json({"token": secret, "entry": entry})
    else:
        print(f"API_TOKEN={secret}    # for the client\nAPI_TOKENS={entry}    # for the API; more are parted by spaces")


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
    """Run the command; every error that a person can cause is a sentence and exit code 1."""
    configure()
    try:
        app()
    except HeadraceError as error:
        plainly(error)
        sys.exit(1)
    except BrokenPipeError:
        # Who read what is printed has enough of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 (a person is shown a sentence, whatever it is)
        get_logger().debug("the command failed", action="command", exc_info=error)
        plainly(
            StartError(f"something unexpected happened ({type(error).__name__}): ENGINE_LOG_LEVEL=debug shows where")
        )
        sys.exit(1)
