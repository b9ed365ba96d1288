"""Where the ranks of a group first meet: torch's store, and the interfaces at which torch listens.

The store has no password, so as few as possible can reach it. Ranks that the front starts meet in a file
in a folder of its own. Ranks of a launcher meet at a port that is bound to MASTER_ADDR, unless the launcher brings a
store of its own (torchrun does). Knows torch.distributed's stores; knows no models.
"""

from __future__ import annotations

import errno
import os
import socket
from datetime import timedelta

from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from moe_serve.parallel.wire.addresses import INTERFACE, address_towards, interface_of
from moe_serve.parallel.wire.environment import STORE, RankAddress

NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"


def open_store(place: RankAddress, timeout: timedelta) -> Store:
    """This rank's way to what all ranks of the group share. OSError if the port is taken."""
    path = os.environ.get(STORE)
    if path:
        return FileStore(path, place.world_size)
    is_master = place.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return TCPStore(
        place.master_addr,
        place.master_port,
        place.world_size,
        is_master,
        timeout,
        master_listen_fd=_listen(place).detach() if is_master else None,
    )


def _listen(place: RankAddress) -> socket.socket:
    """At MASTER_ADDR; where that is a name for this machine from outside, at the interface which leads there."""
    try:
        return socket.create_server((place.master_addr, place.master_port))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server((address_towards(place), place.master_port))


def bind_narrowly(place: RankAddress) -> None:
    """Let gloo listen at the interface that leads to the master, and NCCL at loopback if that is where the master is,
    unless the user has chosen others. Before the process group is made."""
    name = interface_of(address_towards(place))
    if name is None:
        return
    os.environ.setdefault(INTERFACE, name)
    if address_towards(place).startswith("127."):
        os.environ.setdefault(NCCL_INTERFACE, f"={name}")
