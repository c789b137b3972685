"""Fixtures for all suites: real servers, databases for each test, and an environment without anybody's settings."""

import gc
import io
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from engine.control.ledger import Ledger
from engine.control.queue import Queue
from engine.control.rejects import Rejects
from engine.control.store import Store
from engine.fleet.heartbeat import Heartbeat
from engine.fleet.worker import Worker, WorkerIdentity
from engine.local.servers import LocalServers
from engine.model import TERMINAL, Job, JobOptions
from engine.ports import free_port
from engine.s3.client import connect
from engine.s3.objects import Objects
from engine.settings import Settings
from engine.text.batches import Batch
from tests.running import patiently

# How long an example takes depends on the machine, and says nothing about what is tested. Fixtures may be used by all
# examples of a test, as tests are written here.
suppressed = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=suppressed)
hypothesis.settings.load_profile("any machine")

PREFIXES = ("AWS_", "ENGINE_", "API_", "MONGO_", "PORT")

for name in list(os.environ):
    if name.upper() in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        del os.environ[name]  # the tests' servers run on this machine


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """A real mongod with fail points enabled, and a real S3 server, started once per session."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.upper().startswith(PREFIXES):
                patch.delenv(name)
        folder = tmp_path_factory.mktemp("servers")
        patch.chdir(folder)
        for name in ("mongod.port", "s3.port"):  # free ports: other test processes may run at the same time
            (folder / name).write_text(f"{free_port()}\n")
        options = ("--setParameter", "enableTestCommands=1")
        with LocalServers(Settings(), folder, options) as started:
            yield started


def batch_of(*lines: bytes, offset: int = 0, terminated: bool = True) -> Batch:
    """These lines as one batch, which begins at `offset`; unless `terminated`, the last line has no newline."""
    data = b"".join(line + b"\n" for line in lines)
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    data = data if terminated else data[:-1]
    return Batch(offset, offset + len(data), 0, data, ends)


def own_settings(servers: LocalServers) -> Settings:
    """Settings for the real servers, with databases of their own."""
    name = f"t{uuid.uuid4().hex[:12]}"
    uri = servers.overrides["mongo_uri"].replace("/headrace?", f"/{name}?")
    fresh = {"mongo_uri": uri, "engine_control_db": f"{name}_control", "engine_workers": 2, "engine_poll_seconds": 0.2}
    return Settings.model_validate(servers.overrides | fresh)


@pytest.fixture
def settings(servers: LocalServers, clean_environment: None) -> Settings:
    """Settings for one test."""
    return own_settings(servers)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    made = Store(settings)
    patiently(made.prepare)
    yield made
    drop(made, settings)


def drop(store: Store, settings: Settings) -> None:
    """Remove the databases and close the client."""
    for name in (settings.data_db(), settings.engine_control_db):
        patiently(partial(store.client.drop_database, name))
    store.close()


@pytest.fixture
def ledger(store: Store, settings: Settings) -> Ledger:
    return Ledger(store, settings.engine_lease_seconds)


@pytest.fixture
def queue(store: Store, ledger: Ledger) -> Queue:
    return Queue(store, ledger)


@pytest.fixture
def rejects(store: Store, ledger: Ledger) -> Rejects:
    return Rejects(store, ledger)


@pytest.fixture
def objects(settings: Settings) -> Objects:
    return Objects(connect(settings), settings.aws_bucket_name or "")


@pytest.fixture
def drain(settings: Settings, queue: Queue) -> Callable[..., list[Job]]:
    """Run one worker in this process until these jobs have ended, for at most `seconds`; returns the ended jobs."""

    def run(*job_ids: str, seconds: float = 120, **changes: object) -> list[Job]:
        stop = threading.Event()
        identity = WorkerIdentity("here", uuid.uuid4().hex, 0, 0, (), os.getpid())
        worker = Worker(settings.model_copy(update=changes), identity, Heartbeat(), stop)

        def ended(job_id: str) -> bool:
            return patiently(lambda: queue.get(job_id)).state in TERMINAL

        def watch() -> None:
            until = time.monotonic() + seconds
            try:
                while time.monotonic() < until and not all(map(ended, job_ids)):
                    time.sleep(0.02)
            finally:
                stop.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        worker.loop()
        watcher.join()
        gc.enable()
        jobs = [queue.get(job_id) for job_id in job_ids]
        assert all(job.state in TERMINAL for job in jobs), f"not ended within {seconds} seconds: {jobs}"
        return jobs

    return run


@pytest.fixture
def submit(queue: Queue, objects: Objects) -> Callable[..., Job]:
    """Store bytes under a key and submit a job for them."""

    def run(data: bytes, key: str | None = None, **options: object) -> Job:
        source = objects.upload(io.BytesIO(data), key or f"{uuid.uuid4().hex}.ndjson")
        return queue.submit(source, JobOptions(**options))

    return run
