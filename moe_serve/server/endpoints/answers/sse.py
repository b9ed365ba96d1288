"""Server-sent events: dictionaries out as `data:` lines. Knows no requests and no engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies must pass each event on at once."""
COMMENT = b":\n\n"
"""What clients skip."""
SILENCE_S = 10.0
"""A stream that has begun says something this often: proxies close connections that are silent for a minute."""


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def events(items: Iterable[dict[str, Any]]) -> bytes:
    """Several events in one write."""
    return b"".join(map(event, items))


def named_events(items: Iterable[dict[str, Any]]) -> bytes:
    """Several events in one write, each under the name that is its `type`."""
    return b"".join(b"event: " + item["type"].encode() + b"\n" + event(item) for item in items)


class EventStream(StreamingResponse):
    """A response of events. Closes its generator when the client leaves, instead of leaving that to the GC."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes], headers: Mapping[str, str], ping: bytes = b""
    ) -> None:
        """`ping`: what is sent after SILENCE_S without an event; empty: nothing is."""
        super().__init__(rest, media_type=MEDIA_TYPE, headers={**HEADERS, **headers})
        self._first = first
        self._rest = rest
        self._ping = ping
        self._sent_s = 0.0
        """When the last event was sent, on the loop's clock."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._send(send, self._first)
        async with self._pinging(send):
            async for chunk in self._rest:
                await self._send(send, chunk)
        await send(_body(b"", more=False))

    async def _send(self, send: Send, chunk: bytes) -> None:
        await send(_body(chunk))
        self._sent_s = asyncio.get_running_loop().time()

    @asynccontextmanager
    async def _pinging(self, send: Send) -> AsyncIterator[None]:
        """One task for the whole stream: a timer for each event would cost more than the event."""
        if not self._ping:
            yield
            return
        pings = asyncio.create_task(self._send_pings(send))
        try:
            yield
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)

    async def _send_pings(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._sent_s + SILENCE_S - now())
            if now() >= self._sent_s + SILENCE_S:
                await self._send(send, self._ping)


def _body(chunk: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": more}
