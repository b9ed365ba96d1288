"""The address under which other ranks reach this process. Knows sockets; knows no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence

from moe_serve.errors import ConfigError
from moe_serve.parallel.wire.environment import RankAddress

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Network interface of this machine; what gloo obeys as well."""
SIOCGIFADDR = 0x8915


def own_address(place: RankAddress, environ: Mapping[str, str] = os.environ) -> str:
    """Of the interface in GLOO_SOCKET_IFNAME, else of the one from which the master is reached. ConfigError."""
    name = environ.get(INTERFACE, "").split(",")[0]
    return address_of(name) if name else address_towards(place)


def address_towards(place: RankAddress) -> str:
    """Of the interface from which the master is reached. ConfigError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((place.master_addr, place.master_port))  # a datagram socket sends nothing by that
        except OSError as error:
            raise ConfigError(f"MASTER_ADDR={place.master_addr!r} cannot be reached ({error})") from error
        address: str = probe.getsockname()[0]
    return address


def address_of(interface: str) -> str:
    """Its IPv4 address. ConfigError."""
    try:
        return _ask_address(interface)
    except OSError as error:
        raise ConfigError(f"{INTERFACE}={interface}: no such interface with an IPv4 address ({error})") from error


def interface_of(address: str) -> str | None:
    """The interface with this IPv4 address; None if no interface has it as its first. All of 127.x.x.x is loopback."""
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError):  # an interface without an IPv4 address
            found = _ask_address(name)
            if found == address or (found.startswith("127.") and address.startswith("127.")):
                return name
    return None


def _ask_address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def check_reachable(addresses: Sequence[str]) -> None:
    """ConfigError if some of the ranks' addresses mean something on their own machine only."""
    local = [rank for rank, address in enumerate(addresses) if address.startswith("127.")]
    if local and len(local) < len(addresses):
        raise ConfigError(
            f"ranks {local} know themselves only as {addresses[local[0]]}, which other machines cannot reach;"
            f" set {INTERFACE} there to the network interface between the machines"
        )
