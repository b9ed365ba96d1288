"""Wires between ranks that are threads of one process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from moe_serve.parallel.wire.sockets import SocketWire
from tests.patience import PATIENCE_S

Mesh = Callable[..., list[SocketWire]]


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """mesh(size, timeout_s=PATIENCE_S): every rank's wire, over socket pairs."""
    opened: list[SocketWire] = []

    def make(size: int, timeout_s: float = PATIENCE_S) -> list[SocketWire]:
        peers: list[dict[int, socket.socket]] = [{} for _ in range(size)]
        for low in range(size):
            for high in range(low + 1, size):
                peers[low][high], peers[high][low] = socket.socketpair()
        wires = [SocketWire(each, timeout_s) for each in peers]
        opened.extend(wires)
        return wires

    yield make
    for wire in opened:
        wire.close()
