"""Server-sent events: dictionaries out as `data:` lines. Knows no requests and no engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies must pass each event on at once."""


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

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(rest, media_type=MEDIA_TYPE, headers={**HEADERS, **headers})
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send(_body(self._first))
        async for chunk in self._rest:
            await send(_body(chunk))
        await send(_body(b"", more=False))


def _body(chunk: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": more}
