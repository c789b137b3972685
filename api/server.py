"""Runs the HTTP API under waitress, in a process of its own that TERM, INT and HUP stop gracefully."""

import resource
import signal
import tempfile
import threading
from typing import Any, Final

import pymongo
import waitress
from waitress import wasyncore

from api.app import create_app
from api.auth import Guard, Token, exposure_fault, tokens_of
from api.door import open_door
from api.metrics import Durations
from api.uploads import spool_fault
from engine.children import stop_signals
from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.rejects import Rejects
from engine.control.store import Store
from engine.errors import SettingsError, StartError
from engine.logs import get_logger
from engine.ports import check_port, why_not
from engine.s3.client import connect
from engine.s3.direct import DirectUploads
from engine.s3.objects import Objects, warn_if_away
from engine.s3.parts import MAX_PARTS
from engine.settings import Settings

__all__ = ["connection_limit", "serve"]

IDLE_SECONDS: Final = 120
"""An idle connection is closed after this."""

MAX_HEAD_BYTES: Final = 32 * 1024
"""Largest head of a request: its first line and its headers."""

MAX_CONNECTIONS: Final = 4096
FILES_EACH: Final = 2
"""File descriptors that a connection may take: its socket, and a file for a body or an answer that is spooled."""

SPARE_FILES: Final = 200
"""File descriptors that are kept for everything but connections."""

LOOP_SECONDS: Final = 0.2
"""How often the loop checks whether a signal has arrived."""

LAST_SECONDS: Final = 3.0
"""How long a stop waits for the last durations to be written."""

log = get_logger()


def connection_limit() -> int:
    """How many connections may be open. Raises the limit on open files to what they may need, as far as allowed."""
    wanted = FILES_EACH * MAX_CONNECTIONS + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_CONNECTIONS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(100, (allowed - SPARE_FILES) // FILES_EACH)


def _checked(settings: Settings) -> list[Token]:
    """The accepted tokens. Raises SettingsError, which lists everything that is wrong with the settings of the API."""
    wrong: list[str] = []
    tokens: list[Token] = []
    if fault := spool_fault(settings):
        wrong.append(fault)
    try:
        tokens = tokens_of(settings)
    except SettingsError as error:
        wrong.append(str(error))
    else:
        if fault := exposure_fault(settings, tokens):
            wrong.append(fault)
    if wrong:
        raise SettingsError("\n".join(wrong))
    return tokens


def serve(settings: Settings) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        SettingsError: lists everything that is wrong with the settings of the API.
        StartError: the API cannot listen.
        AccessDenied: the user in `MONGO_URI` lacks a permission that is needed.
        Transient: MongoDB does not answer, or there are no credentials for S3.
    """
    tokens = _checked(settings)
    if settings.api_spool_dir is not None:
        tempfile.tempdir = str(settings.api_spool_dir)
    store = Store(settings, pool=settings.api_threads + 2)
    ledger = Ledger(store, settings.engine_lease_seconds)
    queue = Queue(store, ledger)
    s3 = connect(settings)
    # One part size for all files, whose lengths are unknown: the largest must not need more parts than S3 takes.
    part_bytes = max(settings.api_part_bytes, -(-settings.api_max_upload_bytes // MAX_PARTS))
    objects = Objects(s3, settings.aws_bucket_name or "", part_bytes, settings.api_upload_parallel)
    uploads = DirectUploads(store, s3, objects, settings.api_part_bytes)
    guard, durations, stopping = Guard(tokens), Durations(store), threading.Event()
    app = create_app(settings, store, queue, objects, Rejects(store, ledger), uploads, guard, durations, stopping)
    check_port(settings.port, settings.api_host)
    store.prepare()
    sockets: dict[int, Any] = {}
    try:
        server = waitress.create_server(
            app,
            map=sockets,
            host=settings.api_host,
            port=settings.port,
            threads=settings.api_threads,
            max_request_body_size=settings.api_max_upload_bytes + 1,  # the first size that waitress refuses
            # Small, since waitress scans the whole head again with every piece of it that arrives.
            max_request_header_size=MAX_HEAD_BYTES,
            channel_timeout=IDLE_SECONDS,
            # A crowd of idle clients must not keep others out.
            connection_limit=connection_limit(),
            # Makes waitress notice a client that disconnects while its request is being handled.
            channel_request_lookahead=1,
            ident=None,
            clear_untrusted_proxy_headers=True,
        )
    except OSError as error:
        raise StartError(why_not(settings.port, settings.api_host, error)) from None

    open_door(server, settings, guard, durations)

    ended = False

    def handle_signal(number: int, frame: object) -> None:
        # Not an exception: it could surface anywhere, and get lost or interrupt what must not be left half done.
        nonlocal ended
        ended = True

    try:
        for number in stop_signals():
            signal.signal(number, handle_signal)
        log.info("listening", action="start", host=settings.api_host, port=settings.port)
        warn_if_away(objects)
        while not ended:
            wasyncore.loop(timeout=LOOP_SECONDS, map=sockets, use_poll=True, count=1)
    finally:
        stopping.set()
        # Requests under way may finish within the dispatcher's own timeout.
        server.task_dispatcher.shutdown()
        server.close()
        with pymongo.timeout(LAST_SECONDS):
            durations.flush()
        store.close()
    log.info("stopped", action="stop")
    return 0
