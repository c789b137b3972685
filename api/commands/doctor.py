"""`headrace doctor`: checks everything that a load needs, one line each, with what to do if something is wrong."""

import io
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from api.auth import exposure_fault, tokens_of
from api.client import CallFailed, Client, url_of
from api.uploads import spool_fault
from engine.control import schema
from engine.control.stats import live, serving
from engine.control.store import Store, translated
from engine.errors import HeadraceError, WrongClock
from engine.logs import mask
from engine.machine import cores
from engine.ports import addresses
from engine.s3.client import connect
from engine.s3.objects import Objects
from engine.settings import Settings
from engine.text.encode import COMPILED

__all__ = ["Finding", "examine"]

CLOCK_SECONDS: Final = 5.0
"""A larger difference between this machine's clock and a server's is a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check: what was checked, its state (ok, warning or wrong), and a sentence."""

    what: str
    state: str
    message: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Run the checks, one after another."""
    checks: list[tuple[str, Callable[[Settings], Finding]]] = [
        ("MongoDB", _mongodb),
        ("S3", _s3),
        ("clock", _clock),
        ("processes", _processes),
        ("encoder", _encoder),
        ("spool", _spool),
        ("API", _api),
    ]
    for what, check in checks:
        try:
            found = check(settings)
            yield replace(found, message=mask(found.message))
        except HeadraceError as error:
            yield Finding(what, "wrong", mask(str(error)))
            if check is _mongodb:
                settings = settings.model_copy(update={"mongo_uri": None})  # waiting for it once is enough


def _mongodb(settings: Settings) -> Finding:
    if settings.mongo_uri is None:
        return Finding("MongoDB", "warning", "MONGO_URI is not set: `headrace up` starts a server of its own")
    with closing(Store(settings, pool=2)) as store:
        store.ping()
        with translated("checking its version"):
            schema.check(store.control)
        for database in (store.control, store.data):
            probe = database[f"headrace-doctor-{uuid.uuid4().hex}"]
            with translated(f"writing to database {database.name}"):
                probe.insert_one({})
                probe.drop()
        if store.standalone():
            message = (
                "it is not a member of a replica set: make it a replica set of one (--replSet, then rs.initiate())"
            )
            return Finding("MongoDB", "warning", message)
        return Finding("MongoDB", "ok", "a replica set or router answers and accepts writes")


def _clock(settings: Settings) -> Finding:
    """Compare this machine's clock with the servers': S3 refuses signatures whose time is minutes off."""
    off: dict[str, float] = {}
    silent = ""
    if settings.mongo_uri is not None:
        with closing(Store(settings, pool=2)) as store, translated("reading the time of MongoDB"):
            off["MongoDB"] = _ahead(store.control.command("hello")["localTime"].replace(tzinfo=UTC))
    if settings.aws_bucket_name is not None:
        try:
            off["S3"] = _ahead(Objects(connect(settings), settings.aws_bucket_name).time())
        except WrongClock:
            raise
        except HeadraceError:
            silent = "the time of S3 cannot be read: do what the S3 line says, then check again"
    if not off and silent:
        return Finding("clock", "warning", silent)
    if not off:
        return Finding("clock", "warning", "no server answers to compare it with")
    differences = " and ".join(f"{seconds:+.0f} s off that of {name}" for name, seconds in off.items())
    if max(map(abs, off.values())) > CLOCK_SECONDS:
        return Finding("clock", "warning", f"this machine's clock is {differences}: set them, for example with NTP")
    if silent:
        return Finding("clock", "warning", f"this machine's clock is {differences}; {silent}")
    return Finding("clock", "ok", f"this machine's clock is {differences}")


def _ahead(there: datetime) -> float:
    """How many seconds this machine's clock is ahead of one that was just read."""
    return (datetime.now(UTC) - there).total_seconds()


def _s3(settings: Settings) -> Finding:
    if settings.aws_bucket_name is None:
        return Finding("S3", "warning", "AWS_BUCKET_NAME is not set: `headrace up` starts a server of its own")
    objects = Objects(connect(settings), settings.aws_bucket_name)
    objects.check()
    key = f"headrace-doctor-{uuid.uuid4().hex}"
    began = time.perf_counter()
    source = objects.upload(io.BytesIO(b"doctor\n"), key)
    try:
        with objects.open(source, 0, 7) as reader:
            if reader.read(7) != b"doctor\n":
                return Finding("S3", "wrong", "what was read is not what was written: check the S3 server")
    finally:
        objects.delete(key)
    took = 1000 * (time.perf_counter() - began)
    return Finding("S3", "ok", f"bucket {settings.aws_bucket_name} allows write, read, delete ({took:.0f} ms)")


def _processes(settings: Settings) -> Finding:
    there, workers = cores(), settings.engine_workers
    message, state = f"ENGINE_WORKERS={workers} on {there} cores", "ok"
    if workers > 2 * there:
        message, state = f"{message}: more than two per core slow each other down", "warning"
    if settings.mongo_uri is None:
        return Finding("processes", state, message)
    try:
        with closing(Store(settings, pool=2)) as store:
            alive = serving(live(store), store.data.name)
    except HeadraceError:
        return Finding("processes", state, message)  # the check of MongoDB says what is wrong
    if not alive:
        return Finding("processes", "warning", f"{message}, and no worker is alive: start `headrace engine`")
    return Finding("processes", state, f"{message}; workers alive on all machines: {alive}")


def _encoder(settings: Settings) -> Finding:
    if COMPILED:
        return Finding("encoder", "ok", "the extension encodes documents")
    message = (
        "the driver encodes documents, which takes a worker more CPU than the extension, which could not be compiled: "
        "install a C compiler and Python's headers (apt-get install gcc python3-dev), then Headrace again"
    )
    return Finding("encoder", "warning", message)


def _spool(settings: Settings) -> Finding:
    if fault := spool_fault(settings):
        return Finding("spool", "wrong", fault)
    folder = settings.api_spool_dir or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < settings.api_max_upload_bytes:
        message = (
            f"{folder} has {free / 1e9:.1f} GB left and API_MAX_UPLOAD_BYTES is {settings.api_max_upload_bytes / 1e9:.1f} GB: "
            "free some, or set API_SPOOL_DIR to a larger disk"
        )
        return Finding("spool", "warning", message)
    return Finding("spool", "ok", f"{folder} has {free / 1e9:.1f} GB left")


def _api(settings: Settings) -> Finding:
    tokens = tokens_of(settings)
    if fault := exposure_fault(settings, tokens):
        return Finding("API", "wrong", f"`headrace api` will not start: {fault}")
    addresses(settings.port, settings.api_host)
    known = f"{len(tokens) or 'no'} token{'' if len(tokens) == 1 else 's'}"
    message = f"set here to listen on {settings.api_host}:{settings.port}, {known}"
    url = url_of(settings)
    client = Client(url, settings.api_token.get_secret_value() if settings.api_token else None)
    try:
        client.ask("GET", "/queue")  # which, unlike the health checks, needs a token
    except CallFailed as error:
        if error.status != 403:  # a token that may not read is fine
            return Finding("API", "warning", f"{message}; {error}")
    finally:
        client.close()
    return Finding("API", "ok", f"{message}; {url} answers")
