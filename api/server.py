"""The HTTP API under waitress: its own process, stopped softly by TERM and INT."""

import errno
import resource
import signal
import tempfile
from typing import Final

import waitress

from api.app import create_app
from api.auth import is_loopback, tokens_of
from engine.direct import DirectUploads
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

CONNECTIONS_MOST: Final = 4096
SPARE_FILES: Final = 200

log = get_logger()


def _connections() -> int:
    """How many clients may be connected: as many as there are file descriptors, less what the process itself needs."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(100, min(CONNECTIONS_MOST, most - SPARE_FILES))


def serve(settings: Settings) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        StartError: the port is taken, or a setting is missing.
    """
    if settings.api_spool_dir is not None:
        if not settings.api_spool_dir.is_dir():
            raise StartError(f"API_SPOOL_DIR={settings.api_spool_dir} is no folder: make it, or name another")
        tempfile.tempdir = str(settings.api_spool_dir)
    tokens = tokens_of(settings)
    if not tokens and not is_loopback(settings.api_host):
        raise StartError(
            f"API_HOST={settings.api_host} lets other machines in, and there are no tokens: draw some with `headrace token` "
            "and set API_TOKENS, or set API_HOST=127.0.0.1"
        )
    store = Store(settings, pool=settings.api_threads + 2)
    ledger = Ledger(store, settings.engine_lease_seconds)
    queue = Queue(store, ledger)
    s3, bucket = connect(settings), settings.aws_bucket_name or ""
    objects = Objects(s3, bucket, settings.api_part_bytes, settings.api_upload_parallel)
    uploads = DirectUploads(store, s3, bucket, settings.api_part_bytes)
    app = create_app(settings, store, queue, objects, Rejects(store, ledger), uploads, tokens)
    store.prepare()
    try:
        server = waitress.create_server(
            app,
            host=settings.api_host,
            port=settings.port,
            threads=settings.api_threads,
            max_request_body_size=settings.api_max_upload_bytes,
            channel_timeout=IDLE_SECONDS,
            # A crowd of idle clients must not keep others out.
            connection_limit=_connections(),
            asyncore_use_poll=True,
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
