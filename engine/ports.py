"""Ports of this machine: which ones are free, and why one cannot be listened on."""

import errno
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from typing import Any, Final

from engine.errors import StartError

__all__ = ["NEIGHBOUR", "addresses", "check_port", "free_port", "is_loopback", "ports_in_pairs", "why_not"]

_LOCAL_NAMES: Final = ("localhost", "localhost.localdomain")

LOW_PORT: Final = 20_000
"""Ports are drawn from here on."""

_NOT_OURS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

NEIGHBOUR: Final = 10_000
"""SeaweedFS also listens this far above each of its ports. Ports are drawn from a span of this length, so that none of
them is the neighbour of another."""


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine only."""
    if host.lower() in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def port_is_free(port: int) -> bool:
    """Whether a port is free on every address: SeaweedFS rejects one that is taken on any of them."""
    try:
        check_port(port, "0.0.0.0")  # noqa: S104 (nothing listens)
    except StartError:
        return False
    return True


def check_port(port: int, host: str) -> None:
    """Raises StartError, with the reason, unless this port can be listened on now at every address of the host."""
    for family, kind, address in addresses(port, host):
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if str(address[0]) != host.strip("[]") and error.errno in _NOT_OURS:
                # For example localhost, if this machine has no IPv6.
                raise StartError(
                    f"API_HOST={host} also stands for {address[0]}, which is not an address of this machine: set it to "
                    "one that is"
                ) from None
            raise StartError(why_not(port, host, error)) from None


def addresses(port: int, host: str) -> list[tuple[int, int, Any]]:
    """Family, kind and address of each socket to listen on for a host. Raises StartError if it does not resolve."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label is empty or too long
        why = error.strerror if isinstance(error, OSError) else "not a valid host name"
        raise StartError(f"API_HOST={host} is not an address of this machine ({why}): set it to one") from None
    return [(family, kind, address) for family, kind, _, _, address in found]


def why_not(port: int, host: str, error: OSError) -> str:
    """Why a server cannot listen there, and what to do about it."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken: stop what listens there, or set PORT to another"
    if error.errno in _NOT_OURS:
        return f"API_HOST={host} is not an address of this machine: set it to one"
    if error.errno == errno.EACCES:
        return f"port {port} needs special privileges: set PORT to one above 1023"
    return f"cannot listen on {host}:{port}: {error.strerror}"


def free_port(wanted: int = 0) -> int:
    """`wanted` if it is free, else any free port."""
    if wanted and port_is_free(wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ports_in_pairs(names: Sequence[str], beside: int) -> dict[str, int]:
    """Different free ports by name, each with a free neighbour; never `beside` or its neighbour.

    Raises:
        StartError: no free pair was found.
    """
    taken = {beside, beside + NEIGHBOUR}
    ports: dict[str, int] = {}
    for name in names:
        for _ in range(200):
            port = LOW_PORT + secrets.randbelow(NEIGHBOUR)
            pair = {port, port + NEIGHBOUR}
            if not pair & taken and all(map(port_is_free, pair)):
                ports[name] = port
                taken |= pair
                break
        else:
            raise StartError(
                f"no free ports were found between {LOW_PORT} and {LOW_PORT + 2 * NEIGHBOUR} for the S3 server: free some"
            )
    return ports
