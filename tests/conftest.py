"""Real servers for the suites that need them, and an environment without anybody's settings."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.ledger import Ledger
from engine.local import LocalServers
from engine.objects import Objects, connect
from engine.queue import Queue
from engine.rejects import Rejects
from engine.settings import Settings
from engine.store import Store

PREFIXES = ("AWS_", "ENGINE_", "API_", "MONGO_", "PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServers]:
    """A real mongod, with fail points, and a real S3 server, once for all suites."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(PREFIXES):
                patch.delenv(name)
        folder = tmp_path_factory.mktemp("servers")
        patch.chdir(folder)
        options = ("--setParameter", "enableTestCommands=1")
        with LocalServers(Settings(), folder, options) as started:
            yield started


@pytest.fixture
def settings(servers: LocalServers, clean_environment: None) -> Settings:
    """Settings that lead to the real servers, with databases of this test's own."""
    name = f"t{uuid.uuid4().hex[:12]}"
    uri = servers.overrides["mongo_uri"].replace("/headrace?", f"/{name}?")
    fresh = {"mongo_uri": uri, "engine_control_db": f"{name}_control", "engine_workers": 2, "engine_poll_seconds": 0.2}
    return Settings.model_validate(servers.overrides | fresh)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    made = Store(settings)
    made.prepare()
    yield made
    for name in (settings.data_db(), settings.engine_control_db):
        made.client.drop_database(name)
    made.close()


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
