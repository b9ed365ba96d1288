"""Connections that cost the server nothing but a file descriptor: timeouts that uvicorn lacks, and a limit.

A client that never finishes its headers, and one that stops reading its answer, are cut off. Knows uvicorn's
protocol class; timers run per connection and per stall, never per token.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from typing import Any

from moe_serve.errors import ConfigError
from moe_serve.server.transport.exchanges import Exchanges

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than what load balancers in front keep idle connections (60 s is common): the one that did not
send last must not be the one that closes, or requests get lost on the way."""
TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
UNSENT_BYTES = 64 << 10
RESERVED_FILES = 256
"""File descriptors for everything that is no connection: checkpoint shards, libraries, logs."""
FEWEST_FILES = 128
"""Half of these are for connections; below, a server would run out of descriptors while accepting."""
_REFUSAL_BODY = (
    b'{"error": {"message": "too many open connections; try again later", "type": "overloaded_error", "param": null,'
    b' "code": 503}}'
)
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_REFUSAL_BODY),
    _REFUSAL_BODY,
)


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard one; how many connections that leaves room for.

    ConfigError: too few to serve at all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < FEWEST_FILES:
        raise ConfigError(f"the limit of open files is {hard}, too low to serve; raise it to 1024 or more (ulimit -n)")
    room = hard - min(RESERVED_FILES, hard // 2)
    if room < 1024:
        log.warning(
            "at most %d connections are open together, because the limit of open files is %d; raise it with ulimit -n",
            room,
            hard,
        )
    return room


def limit_unsent(transport: asyncio.Transport) -> None:
    """Have a client that does not read be seen soon: by itself Linux takes megabytes for it."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def connection_class(read_timeout_s: float, write_timeout_s: float, max_connections: int) -> type[asyncio.Protocol]:
    """The protocol class to give uvicorn."""

    class Connection(_Connection):
        limits = (read_timeout_s, write_timeout_s, max_connections)

    return Connection


class _Connection(Exchanges):
    """An HTTP/1.1 connection that ends when its client neither sends nor takes."""

    limits: tuple[float, float, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_timeout_s, self._write_timeout_s, self._max_connections = self.limits
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit_unsent(transport)
        if len(self.connections) > self._max_connections:
            transport.write(REFUSAL)
            transport.close()
            return
        self._watch_headers()

    def _parse(self, data: bytes) -> None:
        super()._parse(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_header_timer")
        self._stop("_stall_timer")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client's buffers and ours are full: from now on it has a time to take something."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._write_timeout_s, self._cut_off)

    def resume_writing(self) -> None:
        self._stop("_stall_timer")
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def _watch_closing(self) -> None:
        """A closing connection stays until the client has taken what is buffered; it has the same time for that."""
        if self.transport.is_closing() and self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self._write_timeout_s, self._cut_off)

    def _watch_headers(self) -> None:
        """Have the timer run while the headers of a request are due; uvicorn's own watches the pauses between."""
        in_request = self.cycle is not None and not self.cycle.response_complete
        if in_request or self.timeout_keep_alive_task is not None:
            self._stop("_header_timer")
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._read_timeout_s, self._drop)

    def _drop(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()
            self._watch_closing()

    def _cut_off(self) -> None:
        """Abort rather than close: closing would wait until the client has taken what is buffered."""
        log.info("a client read nothing for %g s; its connection is closed", self._write_timeout_s)
        self.transport.abort()

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
