"""Links: the front's connections to its ranks. Each has a thread that reads and notes when it last heard something.

Knows messages and liveness; knows no plans.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from dataclasses import dataclass, field

import msgspec

from expert_cache.report import ExpertReport
from moe_serve.errors import MoEServeError
from moe_serve.parallel.wire.channel import Channel, ChannelClosed
from moe_serve.parallel.wire.messages import Alive, Answer, Failed, Ready, read_rank

LAST_WORD_S = 2.0
"""Most time to read what a rank has said before it ended."""


class RankLostError(MoEServeError):
    """A rank died or stalled, and the step with it."""

    http_status = 503
    error_type = "rank_lost_error"


@dataclass
class Link:
    """One rank, connected."""

    rank: int
    pid: int
    channel: Channel
    answers: queue.SimpleQueue[Ready | Failed | Answer] = field(default_factory=queue.SimpleQueue)
    heard_s: float = field(default_factory=time.monotonic)
    """time.monotonic() of the last sign of life."""
    closed: bool = False
    changed_file: str | None = None
    """What the rank says of a file of the checkpoint that was written to, once it has found one."""
    report: ExpertReport | None = None
    """What the rank's experts have done, as of its last word about them."""

    def read_forever(self) -> None:
        """On a thread of its own."""
        try:
            while True:
                message = read_rank(self.channel.receive())
                self.heard_s = time.monotonic()
                if isinstance(message, Alive | Ready):
                    self.report = message.report or self.report
                if isinstance(message, Failed) and message.files_changed:
                    self.changed_file = message.message
                if not isinstance(message, Alive):
                    self.answers.put(message)
        except (ChannelClosed, msgspec.MsgspecError):
            self.closed = True
            self.channel.close()

    def hear_out(self) -> None:
        """Wait until all is read that a rank has said whose process has ended."""
        deadline = time.monotonic() + LAST_WORD_S
        while not self.closed and time.monotonic() < deadline:
            time.sleep(0.01)

    def next(self, timeout_s: float) -> Ready | Failed | Answer | None:
        """What the rank said beside its signs of life; None if it said nothing in time."""
        try:
            return self.answers.get(timeout=timeout_s)
        except queue.Empty:
            return None


def open_link(rank: int, pid: int, connected: socket.socket) -> Link:
    """A rank has connected: a thread reads what it says from now on."""
    link = Link(rank, pid, Channel(connected))
    threading.Thread(target=link.read_forever, name=f"rank-{rank}", daemon=True).start()
    return link
