"""Links: the front's connections to its ranks. Each has a thread that reads and notes when it last heard something.

Knows sockets and liveness; knows no plans.
"""

from __future__ import annotations

import hmac
import queue
import socket
import threading
import time
from dataclasses import dataclass, field

from moe_serve.parallel.wire.channel import Channel, ChannelClosed, Message

HELLO_S = 10.0


@dataclass
class Link:
    """One rank, connected."""

    rank: int
    pid: int
    channel: Channel
    answers: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    heard_s: float = field(default_factory=time.monotonic)
    """time.monotonic() of the last sign of life."""
    closed: bool = False
    report: Message | None = None
    """What the rank's experts have done, as of its last word about them."""

    def read_forever(self) -> None:
        """On a thread of its own."""
        try:
            while True:
                message = self.channel.receive()
                self.heard_s = time.monotonic()
                self.report = message.pop("report", self.report)
                if message.get("op") != "alive":
                    self.answers.put(message)
        except ChannelClosed:
            self.closed = True
            self.channel.close()


class Listener:
    """Accepts ranks that know the secret."""

    def __init__(self, host: str, port: int, secret: str) -> None:
        self._secret = secret
        self._socket = socket.create_server((host, port))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def accept(self, timeout_s: float) -> Link | None:
        """The next rank, or None if none came in time or it was a stranger."""
        self._socket.settimeout(timeout_s)
        try:
            connected, _ = self._socket.accept()
        except TimeoutError:
            return None
        channel = Channel(connected)
        try:
            hello = channel.receive(HELLO_S)
        except (ChannelClosed, TimeoutError):
            channel.close()
            return None
        if hello.get("op") != "hello" or not hmac.compare_digest(str(hello.get("secret")), self._secret):
            channel.close()
            return None
        link = Link(int(hello["rank"]), int(hello["pid"]), channel)
        threading.Thread(target=link.read_forever, name=f"rank-{link.rank}", daemon=True).start()
        return link

    def close(self) -> None:
        self._socket.close()
