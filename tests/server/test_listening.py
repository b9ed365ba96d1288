"""The listening socket: accepted connections send small answers at once."""

from __future__ import annotations

import asyncio
import socket

from moe_serve.config import ServerConfig
from moe_serve.server.transport.listening import bind


def test_small_pieces_are_sent_at_once() -> None:
    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                sock = transport.get_extra_info("socket")
                found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with bind(ServerConfig(port=0)) as bound:
            server = await asyncio.get_running_loop().create_server(Connection, sock=bound)
            with socket.create_connection(bound.getsockname()):
                nodelay = await found
            server.close()
        return nodelay

    assert asyncio.run(accepted())
