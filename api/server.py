"""The HTTP API under waitress: its own process, stopped softly by TERM and INT."""

import errno
import signal
import tempfile
from typing import Final

import waitress

from api.app import create_app
from engine.errors import StartError
from engine.ledger import Ledger
from engine.logs import get_logger
from engine.objects import Objects, connect
from engine.queue import Queue
from engine.rejects import Rejects
from engine.settings import Settings
from engine.store import Store

__all__ = ["serve"]

IDLE_SECONDS: Final = 120
"""A connection on which nothing moves is closed after this."""

log = get_logger()


def serve(settings: Settings) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        StartError: the port is taken, or a setting is missing.
    """
    if settings.api_spool_dir is not None:
        if not settings.api_spool_dir.is_dir():
            raise StartError(f"API_SPOOL_DIR={settings.api_spool_dir} is no folder: make it, or name another")
        tempfile.tempdir = str(settings.api_spool_dir)
    store = Store(settings, pool=settings.api_threads + 2)
    ledger = Ledger(store, settings.engine_lease_seconds)
    queue = Queue(store, ledger)
    objects = Objects(
        connect(settings), settings.aws_bucket_name or "", settings.api_part_bytes, settings.api_upload_parallel
    )
    app = create_app(store, queue, objects, Rejects(store, ledger))
    store.prepare()
    try:
        server = waitress.create_server(
            app,
            host=settings.api_host,
            port=settings.port,
            threads=settings.api_threads,
            max_request_body_size=settings.api_max_upload_bytes,
            channel_timeout=IDLE_SECONDS,
            ident=None,
            clear_untrusted_proxy_headers=True,
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {settings.port} is taken: stop what listens there, or set PORT to another"
            ) from None
        raise StartError(f"cannot listen on {settings.api_host}:{settings.port}: {error.strerror}") from None

    def told(number: int, frame: object) -> None:
        # The one exception that the server's loop lets through wherever it is raised.
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)
    log.info("listening", action="start", host=settings.api_host, port=settings.port)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Requests under way are finished, within the task dispatcher's own bound of seconds.
        server.close()
        server.task_dispatcher.shutdown()
        store.close()
    log.info("stopped", action="stop")
    return 0
