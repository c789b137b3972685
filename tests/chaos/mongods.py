"""Real mongods in a replica set on loopback, to be killed, restarted and stepped down."""

import contextlib
import signal
import subprocess
import time

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from engine.children import before_exec
from engine.local.servers import mongod_path
from engine.ports import free_port

SET = "chaos"


class Mongods:
    """A replica set of `count` members under `folder`. Use it as a context manager."""

    def __init__(self, folder, count=1):
        self.folder = folder
        self.ports = [free_port() for _ in range(count)]
        self.running = {}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        for port in self.ports:
            self.start(port)
        members = [{"_id": i, "host": f"127.0.0.1:{port}"} for i, port in enumerate(self.ports)]
        fast = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 300}
        for port in self.ports:
            with self.direct(port) as client:
                self._until(lambda client=client: client.admin.command("ping"))
        with self.direct(self.ports[0], 20_000) as client:
            client.admin.command("replSetInitiate", {"_id": SET, "members": members, "settings": fast})
        self._until(self.primary)

    def __exit__(self, *_):
        for process in self.running.values():
            process.kill()
            process.wait()

    @property
    def uri(self):
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"mongodb://{hosts}/headrace?replicaSet={SET}"

    def direct(self, port, wait=500):
        """A client of one member, which waits for `wait` milliseconds until it can be reached."""
        return MongoClient(
            "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=wait, socketTimeoutMS=20000
        )

    def start(self, port):
        data = self.folder / f"mongod-{port}"
        data.mkdir(parents=True, exist_ok=True)
        command = [
            mongod_path(),
            "--dbpath",
            str(data),
            "--port",
            str(port),
            "--bind_ip",
            "127.0.0.1",
            "--replSet",
            SET,
        ]
        command += ["--wiredTigerCacheSizeGB", "0.5", "--nounixsocket", "--setParameter", "enableTestCommands=1"]
        with (self.folder / f"mongod-{port}.log").open("ab") as log:
            self.running[port] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=before_exec
            )

    def kill(self, port):
        self.running[port].kill()
        self.running[port].wait()

    def pause(self, port, seconds):
        """Freeze a member for `seconds`."""
        self.running[port].send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self.running[port].send_signal(signal.SIGCONT)

    def primary(self):
        """The port of the current primary; None if there is none now."""
        for port in self.ports:
            with contextlib.suppress(PyMongoError), self.direct(port) as client:
                if client.admin.command("hello").get("isWritablePrimary"):
                    return port
        return None

    def step_down(self):
        """Make the primary step down; returns False if there was none, or if it refused."""
        port = self.primary()
        if port is None:
            return False
        try:
            with self.direct(port) as client:
                client.admin.command("replSetStepDown", 5, secondaryCatchUpPeriodSecs=2)
        except PyMongoError:
            return self.primary() != port
        return True

    def _until(self, true, seconds=40):
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(PyMongoError):
                if true():
                    return
            if time.monotonic() > end:
                raise AssertionError("the replica set did not come up")
            time.sleep(0.1)
