"""The `headrace` command: the only place that wires everything together."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from api.load import Client, check_file, plainly, watch
from engine.errors import HeadraceError, SettingsError, StartError
from engine.logs import configure, get_logger
from engine.settings import Settings, load

__all__ = ["app", "main"]

app = typer.Typer(
    name="headrace",
    help="Turns huge line-oriented files in S3 into MongoDB documents.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _settings(*, needs_servers: bool) -> Settings:
    settings, warnings = load()
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


@app.command(name="load")
def load_file(
    file: Annotated[Path, typer.Argument(help="The file to upload and process.")],
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job to its end.")] = False,
    collection: Annotated[str, typer.Option(help="Takes the documents.")] = "records",
    format: Annotated[str, typer.Option(help="auto, ndjson or text.")] = "auto",
    max_errors: Annotated[str, typer.Option(help="A count, or a percentage such as 2%.")] = "1000",
    url: Annotated[str | None, typer.Option(help="Of the API; default: this machine, PORT.")] = None,
) -> None:
    """Upload a file through the API and process it."""
    settings = _settings(needs_servers=False)
    check_file(file)
    client = Client(url or f"http://{settings.api_host}:{settings.port}")
    console = Console(highlight=False, stderr=True)
    key = client.upload(file)
    budget: Any = int(max_errors) if max_errors.isdecimal() else max_errors
    job_id = client.process(key, {"collection": collection, "format": format, "maxErrors": budget})
    print(job_id)
    if not wait:
        return
    status = watch(client, job_id, console)
    if status["error"]:
        plainly(StartError(status["error"]["message"]))
    raise typer.Exit(0 if status["status"] == "COMPLETED" else 1)


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
    try:
        app()
    except HeadraceError as error:
        plainly(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
