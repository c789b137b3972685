"""A proxy between workers and S3 that injects faults, and counts them."""

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
PIECE = 16 * 1024


class Proxy(ThreadingHTTPServer):
    """Listens on loopback and passes requests on to `upstream`.

    `shares` of the GET requests for a range fail: `busy` (503), `reset` (the connection is reset mid-body), `short` (it
    is closed mid-body), `whole` (200 with the whole object, read with `s3`). Each request takes `delay` seconds longer.
    """

    daemon_threads = True

    def __init__(self, upstream, s3=None, seed=0, **shares):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream)
        self.s3 = s3
        self.shares = {"busy": 0.0, "reset": 0.0, "short": 0.0, "whole": 0.0, "delay": 0.0} | shares
        self.faults = Counter()
        self.draw = random.Random(seed)
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fate(self):
        """Draw the fault of a GET, or None, and the share of the body after which it occurs."""
        with self.lock:
            at, where = self.draw.random(), self.draw.random()
        for name in ("busy", "reset", "short", "whole"):
            if at < self.shares[name]:
                return name, where
            at -= self.shares[name]
        return None, 0.0

    def handle_error(self, request, client_address):
        pass  # a killed worker leaves its connection behind


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _pass(self):
        proxy = self.server
        time.sleep(proxy.shares["delay"])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate, where = proxy.fate() if self.command == "GET" and "Range" in self.headers else (None, 0.0)
        if fate:
            proxy.faults[fate] += 1
        if fate == "busy":
            return self._answer(503, {"Content-Type": "application/xml"}, BUSY)
        if fate == "whole":
            _, bucket, key = self.path.split("?")[0].split("/", 2)
            found = proxy.s3.get_object(Bucket=bucket, Key=unquote(key))
            return self._answer(200, {"ETag": found["ETag"]}, found["Body"].read())
        upstream = http.client.HTTPConnection(proxy.upstream.hostname, proxy.upstream.port, timeout=60)
        try:
            # The signature covers the Host header, so it is passed on unchanged.
            upstream.request(self.command, self.path, body or None, dict(self.headers.items()))
            answer = upstream.getresponse()
            length = int(answer.headers.get("Content-Length") or 0)
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return None
            cut = int(where * length) if fate in ("reset", "short") else None
            sent = 0
            while piece := answer.read(PIECE if cut is None else max(1, min(PIECE, cut - sent))):
                self.wfile.write(piece)
                sent += len(piece)
                if cut is not None and sent >= cut:
                    return self._break(fate)
        finally:
            upstream.close()
        return None

    def _break(self, fate):
        self.close_connection = True
        if fate == "reset":
            # SO_LINGER of zero seconds: closing the connection sends a reset.
            self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
        self.wfile.flush()
        self.connection.shutdown(2) if fate == "short" else self.connection.close()

    def _answer(self, status, headers, body):
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815 (names that http.server looks up)
