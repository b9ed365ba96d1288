"""From a bound socket to the end of the process: uvicorn with our connections, layers, front door and drain.

Knows uvicorn and the settings; what is behind the door comes from `load`.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from moe_serve.config import ServerConfig
from moe_serve.server.transport.connections import KEEP_ALIVE_S, connection_class, raise_file_limit
from moe_serve.server.transport.draining import DrainingServer
from moe_serve.server.transport.guard import guard
from moe_serve.server.transport.loading_app import FrontDoor

LISTEN_BACKLOG = 2048
SWITCH_S = 0.001
"""A thread that computes in Python gives way to another after this time. With Python's own 5 ms, each of an engine's
step's returns from C++ waits 5 ms while clients' bodies are read."""


def serve_until_told(
    bound: socket.socket, config: ServerConfig, keys: frozenset[str], load: Callable[[], FastAPI]
) -> FrontDoor:
    """Serve until SIGTERM or SIGINT, or until `load` fails. What is behind the door then, the door knows."""
    door = FrontDoor(load, lambda: _end(server))
    server = DrainingServer(
        _uvicorn_config(guard(door, config, keys), config), door, config.shutdown_timeout_s, config.supervisor
    )
    sys.setswitchinterval(SWITCH_S)
    asyncio.run(server.serve(sockets=[bound]))
    return door


def _end(server: DrainingServer) -> None:
    server.should_exit = True


def _uvicorn_config(app: object, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=connection_class(config.read_timeout_s, config.write_timeout_s, raise_file_limit()),
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=LISTEN_BACKLOG,
        server_header=False,
        log_config=None,
        log_level=config.uvicorn_log_level,
        access_log=False,
    )
