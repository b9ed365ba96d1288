"""Channel: JSON messages over a socket, each after its length. Safe for several senders; knows no message.

JSON rather than pickle: whoever reaches the port can send nonsense but cannot run code.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from typing import Any

LENGTH = struct.Struct("!I")
MAX_MESSAGE_BYTES = 1 << 30

Message = dict[str, Any]


class ChannelClosed(ConnectionError):
    """The other side has gone, or what it says is no message."""


class Channel:
    """One end of a connection."""

    def __init__(self, connected: socket.socket) -> None:
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """ChannelClosed if the other side has gone."""
        data = json.dumps(message, separators=(",", ":")).encode()
        try:
            with self._sending:
                self._socket.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. TimeoutError if it has not come whole in time; ChannelClosed."""
        try:
            self._socket.settimeout(timeout_s)
            (length,) = LENGTH.unpack(self._read(LENGTH.size))
            if length > MAX_MESSAGE_BYTES:
                raise ChannelClosed(f"a message of {length} bytes")
            message = json.loads(self._read(length))
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise ChannelClosed(str(error)) from error
        if not isinstance(message, dict):
            raise ChannelClosed("a message that is no object")
        return message

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise ChannelClosed("the connection has ended")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        """Both sides' next receive ends."""
        with contextlib.suppress(OSError):  # the other side may have been quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(host: str, port: int, timeout_s: float) -> Channel:
    """Keep trying until the other side listens. ChannelClosed when time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return Channel(socket.create_connection((host, port), timeout=5))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ChannelClosed(f"nobody listens at {host}:{port} ({error})") from error
            time.sleep(0.1)
