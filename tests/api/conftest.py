"""Fixtures: the API and an engine as processes, on a real MongoDB and S3, and commands that call the API."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
from bson import ObjectId

from engine.ports import free_port
from engine.s3.client import connect
from engine.s3.objects import Objects
from engine.settings import Settings
from tests.conftest import drop, own_settings
from tests.running import ROOT, Running, failing, taking, until


class Patient(httpx.Client):
    """A client that sends again what is answered 503, as the answer asks: MongoDB or S3 may stand still for a while."""

    def request(self, method, url, **how):
        end = time.monotonic() + 60
        while (answer := super().request(method, url, **how)).status_code == 503 and time.monotonic() < end:
            time.sleep(0.2)
        return answer


@pytest.fixture(scope="session")
def live(servers, tmp_path_factory):
    """An API and an engine for all tests of the session, with clients of the API, of S3 and of the databases."""
    from engine.control.store import Store

    folder = tmp_path_factory.mktemp("live")
    base = own_settings(servers)
    settings = Settings.model_validate(base.model_dump() | {"port": free_port()})
    limits = {"port": settings.port, "api_max_upload_bytes": "40MiB", "api_part_bytes": "5MiB"}
    api = Running("api", settings, folder / "api.log", **limits)
    engine = Running("engine", settings, folder / "engine.log", engine_range_bytes="1MiB", engine_poll_seconds="0.2")
    store = Store(settings)
    s3 = connect(settings)
    try:
        with Patient(base_url=f"http://127.0.0.1:{settings.port}", timeout=60) as http:
            until(lambda: answers(http), what="the API's first answer")
            # A worker that has asked for work has booted, and has swept what is to be forgotten.
            asked = {"counts.seconds_queue": {"$exists": True}}
            until(lambda: store.workers.count_documents(asked) == 2, what="the first look of both workers")
            yield SimpleNamespace(
                http=http,
                port=settings.port,
                settings=settings,
                objects=Objects(s3, settings.aws_bucket_name),
                s3=s3,
                bucket=settings.aws_bucket_name,
                store=store,
                data=store.data,
                api=api,
                engine=engine,
                folder=folder,
                log=api.log.read_text,
                oid=ObjectId,
            )
        assert api.stop() == 0
        assert engine.stop() == 0
    finally:
        api.end()
        engine.end()
        drop(store, settings)


def reported(live):
    """Wait until both workers have told of all that was done before: each sends one report after the other."""
    for _ in range(2):
        was = {worker["_id"]: worker["at"] for worker in live.store.workers.find()}

        def told(was=was):
            return sum(worker["at"] != was.get(worker["_id"]) for worker in live.store.workers.find())

        until(lambda told=told: told() == 2, what="a report of both workers")


def answers(http):
    try:
        return http.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def finish(live):
    """Poll a job over HTTP until it has ended; returns its last status."""

    def run(job_id, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told = live.http.get(f"/status/{job_id}").json()
            if told["status"] in ("COMPLETED", "FAILED", "CANCELLED"):
                return told
            time.sleep(0.05)
        pytest.fail(f"job {job_id} did not end: {told}")

    return run


@pytest.fixture
def raw(live):
    """Send bytes, and with `leave` an end of file; returns all that the server sends until it closes the connection."""

    def run(data, leave=False):
        with socket.create_connection(("127.0.0.1", live.port), timeout=30) as line:
            line.sendall(data)
            if leave:
                line.shutdown(socket.SHUT_WR)
            pieces = []
            while piece := line.recv(65536):
                pieces.append(piece)
            return b"".join(pieces)

    return run


@pytest.fixture
def run(live, tmp_path):
    """Run a `headrace` command, which must exit with `code`; returns the process, its output as `out` and `err`."""

    def go(*arguments, code=0, stdin=None, **changes):
        environment = {
            "API_URL": f"http://127.0.0.1:{live.port}",
            "XDG_STATE_HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-m", "api.cli", *map(str, arguments)],
            env={**os.environ, **environment, **changes},
            input=stdin,
            capture_output=True,
            timeout=120,
            cwd=tmp_path,
        )
        done.out, done.err = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, f"exit code {done.returncode}: {done.out}{done.err}"
        assert "Traceback" not in done.err
        return done

    return go


@pytest.fixture
def start(live, tmp_path):
    """Start a `headrace` command, or `code` in its place; its process is killed after the test if it still runs."""
    started = []

    def go(*arguments, stdin=None, code=None):
        own = {"API_URL": f"http://127.0.0.1:{live.port}", "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *(("-m", "api.cli") if code is None else ("-c", code)), *map(str, arguments)],
            env=os.environ | own,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            # A child would inherit that INT is ignored, as it is if the tests run in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()


def watching(process):
    """Read what a command says until it watches a job of a paused queue; returns it."""
    said = b""
    while b"waits for" not in said:
        said += process.stderr.readline() or pytest.fail(f"the watch ended: {said.decode()}")
    return said


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some file.ndjson"
    path.write_bytes(b"".join(b'{"n":%d}\n' % n for n in range(5000)) + b"bad\n")
    return path


@contextmanager
def slow_inserts(live, milliseconds):
    """Within it each insert command takes this long, so that a load lasts on any machine."""
    with failing(live.store.client, ["insert"], **taking(milliseconds)):
        yield


def counted(live, method, route, status):
    """How many requests with this method, route and status the API has answered, by its metrics."""
    label = f'headrace_http_request_seconds_count{{method="{method}",route="{route}",status="{status}"}}'
    rows = live.http.get("/metrics").text.splitlines()
    return next((float(row.split()[-1]) for row in rows if row.startswith(label)), 0)


def put(live, data=b'{"n":1}\n', key=None):
    """Store a new object; returns its key."""
    return live.objects.upload(io.BytesIO(data), key or f"q/{uuid.uuid4().hex}.ndjson").key


def process(live, key, headers=None, **body):
    """Submit a job over HTTP; returns the response."""
    return live.http.post(f"/process/{key}", json=body, headers=headers)
