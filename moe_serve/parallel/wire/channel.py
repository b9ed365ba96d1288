"""Channel: messages over a socket, each after its length. Safe for several senders; knows no message.

Both sides know each other already (door.py); so a length is believed up to MAX_MESSAGE_BYTES.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

LENGTH = struct.Struct("!I")
MAX_MESSAGE_BYTES = 1 << 30


class ChannelClosed(ConnectionError):
    """The other side has gone, or what it says is no message."""


class Channel:
    """One end of a connection."""

    def __init__(self, connected: socket.socket) -> None:
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._sending = threading.Lock()

    def send(self, message: bytes) -> None:
        """ChannelClosed if the other side has gone."""
        try:
            with self._sending:
                self._socket.sendall(LENGTH.pack(len(message)) + message)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> bytearray:
        """The next message. TimeoutError if nothing comes for this long; ChannelClosed."""
        try:
            self._socket.settimeout(timeout_s)
            (length,) = LENGTH.unpack(self._read(LENGTH.size))
            if length > MAX_MESSAGE_BYTES:
                raise ChannelClosed(f"a message of {length} bytes")
            return self._read(length)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def _read(self, count: int) -> bytearray:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(min(count - len(parts), 1 << 20))
            if not part:
                raise ChannelClosed("the connection has ended")
            parts += part
        return parts

    def close(self) -> None:
        """Both sides' next receive ends."""
        with contextlib.suppress(OSError):  # the other side may have been quicker
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
