"""A MongoDB or an S3 that accepts connections and never answers.

The API, beside real servers, reports it, stays alive, and stops when it is told to.
"""

import io
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import httpx
import pytest
from pymongo.uri_parser import parse_uri

from engine.children import before_exec
from engine.ports import free_port
from tests.api.conftest import answers
from tests.running import ROOT, Running, until


@pytest.fixture
def silent():
    """The port of a server that never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as there:
        yield there.getsockname()[1]


@contextmanager
def passed_on(port):
    """A proxy for `port` in a process of its own, which SIGSTOP can freeze: its pid and its port."""
    command = [sys.executable, "-m", "bench.delay", str(port), "0"]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, preexec_fn=before_exec)
    try:
        yield proxy.pid, int(proxy.stdout.readline())
    finally:
        proxy.kill()
        proxy.communicate()


@contextmanager
def an_api(live, tmp_path, **changes):
    port = free_port()
    api = Running("api", live.settings, tmp_path / "api.log", port=port, **changes)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until(lambda: "listening" in api.log.read_text(), what="the API")
            yield api, http
    finally:
        api.end()


def test_a_stop_does_not_wait_for_an_s3_that_hangs(live, tmp_path, silent):
    with an_api(live, tmp_path, aws_endpoint_url=f"http://127.0.0.1:{silent}") as (api, http):
        told = until(lambda: (now := http.get("/readyz")).json()["checks"]["mongodb"] == "ok" and now, what="MongoDB")
        assert told.status_code == 503
        assert "no answer within" in told.json()["checks"]["s3"]
        assert api.stop(seconds=20) == 0
        assert api.actions("stop")


def test_an_api_whose_database_hangs_still_answers_that_it_is_alive(live, tmp_path):
    [(_, port)] = parse_uri(live.settings.mongo_uri.get_secret_value())["nodelist"]
    with passed_on(port) as (proxy, through):
        uri = f"mongodb://127.0.0.1:{through}/{live.data.name}?directConnection=true"
        with an_api(live, tmp_path, mongo_uri=uri) as (api, http):
            until(lambda: answers(http), what="the API's first answer")
            os.kill(proxy, signal.SIGSTOP)
            waiting = threading.Barrier(41)

            def ask():
                waiting.wait()
                with suppress(httpx.HTTPError):
                    httpx.get(http.base_url.join("/jobs"), timeout=8)

            asking = [threading.Thread(target=ask) for _ in range(40)]
            for each in asking:
                each.start()
            waiting.wait()
            until(lambda: "Task queue depth" in api.log.read_text(), what="calls that find no thread")
            for _ in range(3):
                assert http.get("/healthz", timeout=15).json() == {"status": "ok"}
            for each in asking:
                each.join()
            os.kill(proxy, signal.SIGCONT)
            until(lambda: answers(http), what="the API to be ready again")
            assert api.stop() == 0


def test_liveness_and_jobs_are_answered_while_s3_is_silent_and_others_wait(live, tmp_path):
    job = live.http.post(
        "/process",
        json={"fileKeys": [live.objects.upload(io.BytesIO(b"{}"), "later").key], "runAt": "2099-01-01T00:00:00Z"},
    )
    [waiting] = live.http.get("/jobs", params={"batch": job.json()["batchId"]}).json()["jobs"]
    watch = f"GET /status/{waiting['jobId']} HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=50\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
        port, endpoint = free_port(), f"http://127.0.0.1:{silent.getsockname()[1]}"
        api = Running("api", live.settings, tmp_path / "api.log", port=port, aws_endpoint_url=endpoint)
        lines = []
        try:
            until(lambda: "listening" in (tmp_path / "api.log").read_text(), what="the API")
            for ask in [watch] * 8 + [b"POST /process/x HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 40:
                lines.append(socket.create_connection(("127.0.0.1", port), timeout=30))
                lines[-1].sendall(ask)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                assert [http.get(path).status_code for path in ("/healthz", "/jobs", "/queue")] == [200] * 3
            refused = [line for line in lines if line in select.select(lines, [], [], 0)[0]]
            assert refused
            assert all(b" 503 " in line.recv(65536).split(b"\r\n", 1)[0] for line in refused)
        finally:
            for line in lines:
                line.close()
            api.end()
            live.http.post(f"/jobs/{waiting['jobId']}/cancel")
