"""The port: taken before anything slow, so that a port in use is known at once. Standard library only."""

from __future__ import annotations

import socket

from moe_serve.config import ServerConfig
from moe_serve.errors import ConfigError


def bind(config: ServerConfig) -> socket.socket:
    """A socket on the server's address; ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sets TCP_NODELAY where the protocol is named; else each answer waits 40 ms for a delayed ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        message = f"cannot listen on {config.host} port {config.port} ({reason}); choose another with --port"
        raise ConfigError(message) from error
    return bound
