"""The order of requests and answers on one connection: requests sent ahead, and a client that has said its last word.

A client may send requests before the answer to the first (pipelining): a few are parsed ahead, the rest waits as bytes.
It may also close its sending side and still read (RFC 9112, 9.6): its answer goes on. A client that has left looks the
same until something is sent to it, so an interim answer is. Knows uvicorn's protocol class; knows no endpoint.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from moe_serve.server.transport.request_head import BoundedHead

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

PIECE_BYTES = 16 << 10
"""Parsed in one go. The smallest requests in it, some 600, take the event loop 30 ms."""
PROBES_S = (1.0, 0.5)
"""Times until the first and the second interim answer: whoever has left resets the connection after the first, and
the second finds that out."""
LATER_PROBES_S = 5.0
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


class Exchanges(BoundedHead):
    """A connection that answers in order, to the end of what was asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; uvicorn's `cycle` is the one parsed last."""
        self._unparsed = b""
        self._is_half_closed = False
        self._is_refusal_due = False
        self._num_probes = 0
        self._probe_timer: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def data_received(self, data: bytes) -> None:
        self._parse(self._unparsed + data)

    def _parse(self, data: bytes) -> None:
        """As far as the requests are next in turn."""
        start = 0
        while start < len(data) and not self.pipeline and not self.transport.is_closing():
            super().data_received(data[start : start + PIECE_BYTES])
            start += PIECE_BYTES
        self._unparsed = data[start:]
        if self._unparsed:
            self.flow.pause_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unparsed and not self.transport.is_closing():
            self._parse(self._unparsed)
        if self.is_answering:
            return
        if self._is_refusal_due:
            super().send_400_response("")
        elif self._is_half_closed:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What came before the bytes that are no HTTP is answered first; the request that they belong to ends."""
        broken = self.cycle if self.cycle is not None and self.cycle.more_body else None
        if broken is not None and not broken.response_complete:
            broken.disconnected = True
            broken.waiting_for_100_continue = False  # or its reading would ask for the body after the last word
            broken.message_event.set()
            self.pipeline = deque(entry for entry in self.pipeline if entry[0] is not broken)
        if self.is_answering and self._running is not broken:
            self._is_deaf = self._is_refusal_due = True
        else:
            super().send_400_response(msg)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """True keeps the connection for the answer. A request that is not complete never will be."""
        if not self.is_answering or (self._running is self.cycle and self.cycle.more_body):
            return None
        self._is_half_closed = True
        if self._running is not None:
            self._running.scope.setdefault("state", {})["is_half_closed"] = True
        self._probe_later()
        return True

    def _probe_later(self) -> None:
        delay_s = PROBES_S[self._num_probes] if self._num_probes < len(PROBES_S) else LATER_PROBES_S
        self._probe_timer = self.loop.call_later(delay_s, self._probe)

    def _probe(self) -> None:
        """Interim answers are for HTTP/1.1; an answer that has begun is probe enough."""
        running = self._running
        if running is not None and not running.response_started and running.scope["http_version"] == "1.1":
            self._num_probes += 1
            self.transport.write(INTERIM)
        self._probe_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._unparsed = b""
        super().connection_lost(exc)
