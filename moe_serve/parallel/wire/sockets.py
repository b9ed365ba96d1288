"""Wires: bytes from rank to rank, each message after its length, so that no sizes are exchanged first.

`SocketWire` is a mesh of TCP connections: a message leaves when it is ready and is there one link delay later. Gloo
first asks the receiver whether it is ready, which costs a whole round trip for each of its collectives.
`GroupWire` does the same over the process group's point-to-point operations, which is what NCCL offers.
Knows bytes and ranks; knows no tokens.
"""

from __future__ import annotations

import secrets
import select
import socket
import struct
import time
from collections.abc import Collection, Mapping
from typing import Protocol

import torch
import torch.distributed as dist

from moe_serve.parallel.wire.addresses import check_reachable, own_address
from moe_serve.parallel.wire.door import WORD_BYTES, Door, knock
from moe_serve.parallel.wire.environment import RankAddress

LENGTH = struct.Struct("!Q")
CONNECT_S = 60.0


class Wire(Protocol):
    """What one rank says to others and hears from them."""

    def trade(self, outgoing: Mapping[int, torch.Tensor], incoming: Collection[int]) -> dict[int, torch.Tensor]:
        """Send uint8 [n] to each rank of `outgoing`, and return one message from each rank of `incoming`.

        A rank that is named here must name this rank in its own trade of the same turn.
        """
        ...


class RankGoneError(ConnectionError):
    """Another rank has closed its connection or says nothing."""


class SocketWire:
    """TCP connections to all other ranks."""

    def __init__(self, peers: dict[int, socket.socket], timeout_s: float) -> None:
        """`timeout_s`: longest wait for a message."""
        self._timeout_s = timeout_s
        self._peers = peers
        for peer in peers.values():
            if peer.family == socket.AF_INET:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setblocking(False)

    def trade(self, outgoing: Mapping[int, torch.Tensor], incoming: Collection[int]) -> dict[int, torch.Tensor]:
        """As Wire.trade. RankGoneError."""
        sends = [_Sending(rank, self._peers[rank], data) for rank, data in outgoing.items()]
        receives = [_Receiving(rank, self._peers[rank]) for rank in incoming]
        open_ends = self._progress([*sends, *receives])
        if open_ends:
            self._wait(open_ends)
        return {end.rank: end.data for end in receives}

    def _wait(self, ends: list[_Sending | _Receiving]) -> None:
        deadline = time.monotonic() + self._timeout_s
        poll = select.poll()
        while ends:
            for peer in {end.peer for end in ends}:
                poll.register(peer, sum({end.event for end in ends if end.peer is peer}))
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                raise RankGoneError(f"ranks {sorted({end.rank for end in ends})} said nothing for {self._timeout_s} s")
            for peer in {end.peer for end in ends}:
                poll.unregister(peer)
            ends = self._progress(ends)

    def _progress(self, ends: list[_Sending | _Receiving]) -> list[_Sending | _Receiving]:
        """Those that are not done yet."""
        unfinished = []
        for end in ends:
            try:
                is_done = end.advance()
            except OSError as error:
                raise RankGoneError(f"rank {end.rank} has gone: {error}") from error
            if not is_done:
                unfinished.append(end)
        return unfinished

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def __del__(self) -> None:
        self.close()


class _Sending:
    """A message on its way out."""

    event = select.POLLOUT

    def __init__(self, rank: int, peer: socket.socket, data: torch.Tensor) -> None:
        self.rank = rank
        self.peer = peer
        self._views = [memoryview(LENGTH.pack(len(data))), data.contiguous().numpy().data]

    def advance(self) -> bool:
        """Send what the connection takes now; whether that was all."""
        while self._views:
            try:
                sent = self.peer.sendmsg(self._views)
            except BlockingIOError:
                return False
            while self._views and sent >= len(self._views[0]):
                sent -= len(self._views.pop(0))
            if sent:
                self._views[0] = self._views[0][sent:]
        return True


class _Receiving:
    """A message on its way in. Reads not a byte more, because the next may belong to the next turn."""

    event = select.POLLIN

    def __init__(self, rank: int, peer: socket.socket) -> None:
        self.rank = rank
        self.peer = peer
        self.data = torch.empty(0, dtype=torch.uint8)
        self._length = bytearray(LENGTH.size)
        self._missing = memoryview(self._length)
        self._in_length = True

    def advance(self) -> bool:
        """Read what is there; whether the message is complete."""
        while len(self._missing) or self._in_length:
            if not len(self._missing):
                self._in_length = False
                self.data = torch.empty(LENGTH.unpack(self._length)[0], dtype=torch.uint8)
                self._missing = self.data.numpy().data
                continue
            try:
                count = self.peer.recv_into(self._missing)
            except BlockingIOError:
                return False
            if not count:
                raise RankGoneError("its connection has ended")
            self._missing = self._missing[count:]
        return True


def connect_all(place: RankAddress, timeout_s: float) -> SocketWire:
    """A mesh of the ranks of the process group, over which they learn each other's addresses. ConfigError, OSError."""
    host, word = own_address(place), secrets.token_bytes(WORD_BYTES)
    door = Door((host, 0))
    try:
        door.open(word)
        entries = _tell_all((host, door.address[1], word), place.world_size)
        check_reachable([host for host, _, _ in entries])
        peers = {
            r: knock((host, port), word, place.rank, CONNECT_S)
            for r, (host, port, word) in enumerate(entries[: place.rank])
        }
        deadline = time.monotonic() + CONNECT_S
        while len(peers) < place.world_size - 1:
            caller = door.next(deadline - time.monotonic())
            if caller is None:
                missing = sorted(set(range(place.world_size)) - peers.keys() - {place.rank})
                raise RankGoneError(f"ranks {missing} did not connect within {CONNECT_S:g} s")
            peers[caller.rank] = caller.connected
    finally:
        door.close()
    return SocketWire(peers, timeout_s)


def _tell_all(entry: tuple[str, int, bytes], num_ranks: int) -> list[tuple[str, int, bytes]]:
    """Every rank's address, port and word, by rank."""
    host, port, word = entry
    packed = torch.frombuffer(bytearray(host.encode().ljust(64) + port.to_bytes(4, "big") + word), dtype=torch.uint8)
    gathered = [torch.empty_like(packed) for _ in range(num_ranks)]
    dist.all_gather(gathered, packed)
    raws = [tensor.numpy().tobytes() for tensor in gathered]
    return [(raw[:64].decode().strip(), int.from_bytes(raw[64:68], "big"), raw[68:]) for raw in raws]


class GroupWire:
    """The same over torch.distributed: first the lengths, then the messages."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def trade(self, outgoing: Mapping[int, torch.Tensor], incoming: Collection[int]) -> dict[int, torch.Tensor]:
        """As Wire.trade."""
        lengths = {rank: torch.tensor([len(data)], device=self._device) for rank, data in outgoing.items()}
        announced = {rank: torch.zeros(1, dtype=torch.int64, device=self._device) for rank in incoming}
        self._move(lengths, announced)
        arrived = {r: torch.empty(int(n), dtype=torch.uint8, device=self._device) for r, n in announced.items()}
        self._move(
            {rank: data.contiguous() for rank, data in outgoing.items() if len(data)},
            {rank: data for rank, data in arrived.items() if len(data)},
        )
        return arrived

    def _move(self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]) -> None:
        sends = [dist.P2POp(dist.isend, data, rank) for rank, data in outgoing.items()]
        receives = [dist.P2POp(dist.irecv, data, rank) for rank, data in incoming.items()]
        if sends or receives:
            for work in dist.batch_isend_irecv([*sends, *receives]):
                work.wait()
