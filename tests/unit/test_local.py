"""What is kept of the embedded servers between runs, and how they are stopped. None is started."""

import json
import os
from types import SimpleNamespace

import pytest

from engine.local.servers import LocalServers, _may_make_sockets, _write_private
from engine.settings import Settings


@pytest.fixture
def servers(tmp_path):
    return LocalServers(Settings(), tmp_path)


def test_a_stop_that_is_interrupted_goes_on_where_it_was(servers):
    stopped, interrupts = [], [KeyboardInterrupt]

    def server(name):
        def stop():
            if name == "weed" and interrupts:
                raise interrupts.pop()
            stopped.append(name)

        return SimpleNamespace(stop=stop)

    servers._servers |= {"mongod": server("mongod"), "weed": server("weed")}
    with pytest.raises(KeyboardInterrupt):
        servers.stop()
    servers.stop()
    servers.stop()
    assert stopped == ["weed", "mongod"]


def test_a_start_that_fails_within_a_context_is_stopped(servers, monkeypatch):
    stopped = []
    monkeypatch.setattr(servers, "start", lambda: 1 / 0)
    monkeypatch.setattr(servers, "stop", lambda: stopped.append(True))
    with pytest.raises(ZeroDivisionError), servers:
        pass
    assert stopped == [True]


def test_the_secret_stays_the_same_and_nobody_else_can_read_it(servers, tmp_path):
    secret = servers._secret()
    assert len(secret) > 20
    assert servers._secret() == secret
    assert (tmp_path / "s3.secret").stat().st_mode & 0o777 == 0o600


def test_a_secret_that_a_full_disk_left_empty_is_drawn_anew(servers, tmp_path):
    (tmp_path / "s3.secret").write_text("")
    assert len(servers._secret()) > 20


def test_what_cannot_be_written_whole_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "s3.json"
    _write_private(file, json.dumps({"first": 1}))
    with pytest.raises(TypeError):
        _write_private(file, None)
    assert json.loads(file.read_text()) == {"first": 1}


def test_a_port_beside_which_another_user_left_a_socket_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.local.servers.SOCKET_FOLDER", tmp_path)
    (tmp_path / "seaweedfs-s3-grpc-18833.sock").touch()
    assert _may_make_sockets(8833)  # a socket of the same user is replaced
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert not _may_make_sockets(8833)
    assert _may_make_sockets(8834)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert _may_make_sockets(8833)
