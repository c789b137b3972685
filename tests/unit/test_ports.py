"""A free port is free on every address, and an address that cannot be listened on is refused with the reason."""

import socket

import pytest

from api.auth import exposure_fault
from engine.errors import StartError
from engine.ports import check_port, free_port
from engine.settings import Settings


def test_a_port_that_is_taken_on_another_address_is_not_free():
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_a_name_of_which_one_address_is_none_of_this_machine_is_told(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0)) for host in ("127.0.0.1", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: found)
    with pytest.raises(StartError, match=r"API_HOST=localhost also stands for 192\.0\.2\.1,"):
        check_port(0, "localhost")


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_a_name_that_no_host_can_have_is_told(host):
    with pytest.raises(
        StartError, match=rf"API_HOST={host} is not an address of this machine \(not a valid host name\)"
    ):
        check_port(0, host)
    assert "is not an address of this machine" in exposure_fault(Settings(api_host=host), [])
