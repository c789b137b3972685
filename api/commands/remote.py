"""The commands that call the HTTP API: loads, jobs, the queue, the workers."""

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from api.client import Client, check_file, is_stream, url_of, utf8_name
from api.commands.loader import STDIN, Loader
from api.commands.show import (
    counted_since,
    job_lines,
    jobs_table,
    plainly,
    print_json,
    profile_table,
    queue_lines,
    watch,
    workers_table,
)
from api.commands.terminal import EXIT_INTERRUPTED, EXIT_OF, AsJson, console, is_live, settings_of
from api.models import ProcessRequest
from engine.control.admission import check_collection_name
from engine.control.stats import REPORT_SECONDS
from engine.errors import CommandError, Refused
from engine.logs import printable
from engine.model import Format, JobState
from engine.values import http_url

__all__ = ["remote"]

TOP_SECONDS: Final = 1.0
"""How often `top` is refreshed."""

PROFILE_SECONDS: Final = 4.0
"""Workers report every two seconds: at least one whole interval lies within."""

MOST_PROFILE_SECONDS: Final = 3600.0

SECONDS_RANGE: Final = f"{REPORT_SECONDS:g} to {MOST_PROFILE_SECONDS:g} seconds"

NO_WORKER: Final = "no worker is alive: start `headrace engine`"

Url = Annotated[str | None, typer.Option(help="URL of the API; default: API_URL, or this machine and PORT.")]
JobId = Annotated[str, typer.Argument(help="Id of the job.")]

remote = typer.Typer()


def _client(url: str | None) -> Client:
    try:
        http_url(url)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
    settings = settings_of(needs_servers=False)
    token = settings.api_token.get_secret_value() if settings.api_token else None
    return Client(url or url_of(settings), token)


@remote.command()
def load(
    files: Annotated[list[str], typer.Argument(help="Files, s3://bucket/key for objects, - for standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Watch the jobs until they end.")] = False,
    collection: Annotated[str, typer.Option(help="Where the documents go.")] = "records",
    format: Annotated[Format, typer.Option(case_sensitive=False, help="How a line becomes a document.")] = Format.AUTO,
    max_errors: Annotated[str, typer.Option(help="Rejects allowed: a count, or a percentage such as 2%.")] = "1000",
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    run_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Start no earlier than this, such as 2026-11-24T09:00:00Z.")
    ] = None,
    timeout_seconds: Annotated[int | None, typer.Option(help="Fail if it runs longer.")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Dry run: read and check, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Load it again as a second copy, with new ids.")] = False,
    skip_loaded: Annotated[bool, typer.Option("--skip-loaded", help="Skip what is already loaded.")] = False,
    through_api: Annotated[bool, typer.Option("--through-api", help="Upload through the API, not directly.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload files and process them. After an interruption, run it again: it resumes where it stopped."""
    budget: Any = int(max_errors) if re.fullmatch("[0-9]{1,16}", max_errors) else max_errors
    options = {"collection": collection, "format": format.value, "maxErrors": budget, "priority": priority}
    options |= {"validate": validate, "force": force, "ifLoaded": "skip" if skip_loaded else "load"}
    options |= {"runAt": run_at} if run_at is not None else {}
    options |= {"timeoutSeconds": timeout_seconds} if timeout_seconds is not None else {}
    _check_options(options)
    _check_files(files, through_api=through_api)
    client = _client(url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise what was sent of a stream would stay in S3
    client.ask("GET", "/healthz")  # fails at once without an API; one that goes away later is waited for
    loads = Loader(client, options, wait=wait, through_api=through_api).run(files)
    if as_json:
        print_json([load.summary() for load in loads])
    else:
        for load in loads:
            # The id is needed to follow a job that was not watched to its end.
            if load.job_id is not None and (not wait or load.error is not None):
                print(load.job_id)
            elif load.status is not None:
                print("\n".join(job_lines(load.status)))
    exits = [0]
    for load in loads:
        if load.error is not None:
            goes_on = f"; job {load.job_id} goes on: see `headrace status {load.job_id}`" if load.job_id else ""
            plainly(f"{load.file}: {load.error}{goes_on}")
            exits.append(1)
            continue
        if load.earlier:
            plainly(
                f"{load.file}: job {load.job_id}, which an earlier command submitted, has COMPLETED: run the same command "
                "again to load it once more"
            )
        if load.status is not None:
            exits.append(EXIT_OF.get(load.status["status"], 0))
            if load.status["error"]:
                plainly(f"{load.file}: {load.status['error']['message']}")
    raise typer.Exit(max(exits))


def _check_options(options: dict[str, Any]) -> None:
    """Raises BadParameter for what the API would refuse, before a file is uploaded in vain."""
    try:
        check_collection_name(ProcessRequest.model_validate(options).collection)
    except Refused as error:
        raise typer.BadParameter(str(error), param_hint="--collection") from None
    except ValidationError as error:
        fault = error.errors()[0]
        option = "--" + re.sub("[A-Z]", lambda capital: "-" + capital.group().lower(), str(fault["loc"][0]))
        raise typer.BadParameter(fault["msg"].removeprefix("Value error, "), param_hint=option) from None


def _check_files(files: list[str], *, through_api: bool) -> None:
    """Raises CommandError for an unreadable file, BadParameter for a duplicate, or a stream to go through the API."""
    seen = set()
    for file in files:
        here = file != STDIN and not file.startswith("s3://")
        if here:
            check_file(Path(file))
        if through_api and (file == STDIN or (here and is_stream(Path(file)))):
            why = "a stream is sent in parts, straight to S3: save it to a file to send it through the API"
            raise typer.BadParameter(why, param_hint="--through-api")
        place = str(Path(file).resolve()) if here else file
        if place in seen:
            raise typer.BadParameter(f"{file} is named twice: name each file once", param_hint="FILES...")
        seen.add(place)


@remote.command()
def jobs(
    status: Annotated[JobState | None, typer.Option(case_sensitive=False, help="Only jobs in this state.")] = None,
    file: Annotated[str | None, typer.Option(help="Only jobs of this key.")] = None,
    collection: Annotated[str | None, typer.Option(help="Only jobs of this collection.")] = None,
    batch: Annotated[str | None, typer.Option(help="Only jobs of this batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Maximum to show.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the previous page ended.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    asked: dict[str, Any] = {"status": status.value if status else None, "file": file, "collection": collection}
    asked |= {"batch": batch, "limit": limit, "cursor": cursor}
    page = _client(url).ask("GET", "/jobs", params={name: value for name, value in asked.items() if value is not None})
    if as_json:
        print_json(page)
    else:
        screen = console()
        screen.print(jobs_table(page["jobs"], screen.width))
        if page["next"]:
            plainly(f"there are more: add --cursor {page['next']}")


@remote.command(name="status")
def show_status(
    job_id: JobId,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it until it ends.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show a job; the exit code says how it ended."""
    client = _client(url)
    if wait:
        client.status(job_id)  # fails at once if the job, or the API, is not there
        try:
            watch(client, job_id, Console(highlight=False, emoji=False, stderr=True))
        except KeyboardInterrupt:
            plainly(f"the job goes on: see `headrace status {job_id} --wait`")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    # An outage that the watch outlived must not end it either.
    job = (client.insist if wait else client.ask)("GET", f"/jobs/{quote(job_id, safe='')}")
    if as_json:
        print_json(job)
    else:
        print("\n".join(job_lines(job)))
    raise typer.Exit(EXIT_OF.get(job["status"], 0))


def _act(job_id: str, what: str, url: str | None, as_json: bool) -> None:
    job = _client(url).ask("POST", f"/jobs/{quote(job_id, safe='')}/{what}")
    if as_json:
        print_json(job)
    else:
        print("\n".join(job_lines(job)))


def _shown(reject: dict[str, Any]) -> str:
    """The beginning of a rejected line, or of its base64 if the line is not UTF-8."""
    encoding = f"{reject['encoding']}: " if "encoding" in reject else ""
    return encoding + printable(reject["raw"][:80])


@remote.command()
def cancel(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a job; documents that were written stay."""
    _act(job_id, "cancel", url, as_json)


@remote.command()
def retry(job_id: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Rerun the ranges of a job that are not done."""
    _act(job_id, "retry", url, as_json)


@remote.command()
def rejects(
    job_id: JobId,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the raw lines (the first 64 KiB of each) to this file, to fix and load again; - for standard "
            "output."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Maximum to show.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the previous page ended.")] = None,
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
        try:
            size = _save(out, client.rejected(job_id))
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: symbolic links in a loop
            why = getattr(error, "strerror", None) or error
            raise CommandError(f"{str(out)!r} cannot be written ({why}): name another file") from None
        if as_json:
            print_json({"out": utf8_name(str(out)), "bytes": size})
        else:
            print(f"{utf8_name(str(out))}: {size:,} bytes")
        return
    asked = {"limit": limit} | ({} if cursor is None else {"cursor": cursor})
    page = client.ask("GET", f"/jobs/{quote(job_id, safe='')}/rejects", params=asked)
    if as_json:
        print_json(page)
        return
    table = Table("line", "byte", "reason", "detail", "raw")
    for reject in page["rejects"]:
        line, offset = str(reject["line"] or ""), str(reject["offset"])
        table.add_row(line, offset, reject["reason"], printable(reject["detail"]), _shown(reject))
    console().print(table)
    if page["next"]:
        more = f"--cursor {page['next']}, or save all raw lines with --out FILE"
        plainly(f"there are more: add {more}")


def _save(out: Path, pieces: Iterable[bytes]) -> int:
    """Write pieces to a file, which is replaced only once all of them have arrived; returns their size in bytes."""
    if out.exists() and not out.is_file():
        with out.open("wb") as there:  # a pipe or a device: its reader gets the pieces as they arrive
            return sum(map(there.write, pieces))
    target = out.resolve()  # the target of a symbolic link is replaced, and the link stays
    handle, part = tempfile.mkstemp(prefix=".headrace-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            size = sum(map(file.write, pieces))
        mask = os.umask(0)
        os.umask(mask)
        Path(part).chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~mask)
        Path(part).replace(target)
        return size
    finally:
        with suppress(OSError):
            Path(part).unlink()


def _show_queue(queue: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(queue)
    else:
        print("\n".join(queue_lines(queue)))


@remote.command(name="queue")
def show_queue(url: Url = None, as_json: AsJson = False) -> None:
    """Show the queue: whether it is paused, and its jobs by state."""
    _show_queue(_client(url).ask("GET", "/queue"), as_json)


@remote.command()
def pause(url: Url = None, as_json: AsJson = False) -> None:
    """Start no more ranges until the queue is resumed."""
    _show_queue(_client(url).ask("POST", "/queue/pause"), as_json)


@remote.command()
def resume(url: Url = None, as_json: AsJson = False) -> None:
    """Resume the queue after a pause."""
    _show_queue(_client(url).ask("POST", "/queue/resume"), as_json)


@remote.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Show them once.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Watch the workers: their jobs, ranges, rates and memory."""
    client = _client(url)
    if as_json:
        print_json(client.ask("GET", "/workers"))
        return
    screen = console()
    if once or not is_live(screen):
        workers = client.ask("GET", "/workers")["workers"]
        if workers:
            screen.print(workers_table(workers))
        else:
            plainly(NO_WORKER)
        return
    try:
        with Live(console=screen, auto_refresh=False) as live:
            while True:
                workers = client.insist("GET", "/workers")["workers"]  # outlasts a restart of the API
                live.update(workers_table(workers) if workers else NO_WORKER, refresh=True)
                time.sleep(TOP_SECONDS)
    except KeyboardInterrupt:
        pass


@remote.command()
def profile(
    seconds: Annotated[
        float,
        # 0 is allowed besides the range, which min and max cannot express.
        typer.Option(help=f"How long to measure, {SECONDS_RANGE}; 0: since they started."),
    ] = PROFILE_SECONDS,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show where the live workers spend their time, stage by stage; as JSON, their counters over this time."""
    if seconds and not REPORT_SECONDS <= seconds <= MOST_PROFILE_SECONDS:
        why = (
            f"workers report every {REPORT_SECONDS:g} seconds: measure for {SECONDS_RANGE}, or use 0 for all since "
            "they started"
        )
        raise typer.BadParameter(why, param_hint="--seconds")
    client = _client(url)
    workers = client.ask("GET", "/workers")["workers"]
    if seconds:
        time.sleep(seconds)
        workers = counted_since(workers, client.ask("GET", "/workers")["workers"])
    if as_json:
        print_json({"workers": workers})
    elif workers:
        console().print(profile_table(workers))
    else:
        plainly(NO_WORKER)
