"""The door of all replicas: reads a request whole, has one replica answer it, relays the answer as it comes.

A replica that is lost before its answer began costs the client nothing: another one gets the request. Later the answer
ends with an error that says so. Knows ASGI and `send`; knows no Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from moe_serve.errors import EngineDeadError, MoEServeError, OverloadedError
from moe_serve.scale.affinity import prefix_hashes
from moe_serve.scale.exchange import Request, carried
from moe_serve.scale.metrics import merged
from moe_serve.scale.prompt_text import prompt_text
from moe_serve.server.transport.http_errors import error_body, error_response

log = logging.getLogger(__name__)

MOST_TRIES = 3
"""Replicas that a request is sent to, one after the other, while each is lost."""
RETRY_AFTER_S = 5
"""For clients that found all replicas full."""
PROMPT_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""Requests whose cached prefix matters."""


class Answer(Protocol):
    """Messages of one answer; closing it aborts the request."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> object: ...


class Ingress:
    """ASGI application in front of `send`, which gives a request to a replica.

    metrics: texts by replica. is_loss: whether an exception of an answer means that its replica is gone. is_full: that
    none takes more requests.
    """

    def __init__(
        self,
        send: Callable[[Request], Answer],
        metrics: Callable[[], Awaitable[Mapping[str, str]]],
        is_loss: Callable[[BaseException], bool],
        is_full: Callable[[BaseException], bool],
    ) -> None:
        self._send = send
        self._metrics = metrics
        self._is_loss = is_loss
        self._is_full = is_full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["path"] == "/metrics" and scope["method"] == "GET":
            text = merged(await self._metrics())
            await PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(receive)
        except MoEServeError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if body is None:
            return
        hashes = await asyncio.to_thread(_hashes, scope, body)
        relay = _Relay(scope, receive, send)
        for _ in range(MOST_TRIES):
            answer = self._send(carried(scope, body, hashes))
            try:
                await relay.run(answer)
                return
            except Exception as error:
                if self._is_full(error):
                    await relay.fail(OverloadedError("all replicas are busy", RETRY_AFTER_S))
                    return
                if not self._is_loss(error):
                    raise
                log.warning("a replica was lost while it answered %s: %s", scope["path"], type(error).__name__)
                if relay.has_begun:
                    break
        await relay.fail(EngineDeadError("the replica that computed this answer was lost; send the request again"))


async def _live(receive: Receive, send: Send) -> None:
    """Nothing to begin and nothing to end."""
    while (kind := (await receive())["type"]) != "lifespan.shutdown":
        await send({"type": f"{kind}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def _hashes(scope: Scope, body: bytes) -> tuple[bytes, ...]:
    if scope["path"].rstrip("/") not in PROMPT_PATHS:
        return ()
    return tuple(prefix_hashes(prompt_text(body), scope.get("state", {}).get("prefix_owner", "")))


async def _read_body(receive: Receive) -> bytes | None:
    """None: the client left."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


class _Relay:
    """The client's side of one exchange."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.has_begun = False
        self._is_stream = False
        self._is_over = False

    async def run(self, answer: Answer) -> None:
        """Relay a whole answer; a client that leaves ends it early, and aborts the request."""
        relaying = asyncio.ensure_future(self._relay(answer))
        leaving = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait({relaying, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not relaying.done():
                return
            await relaying
        finally:
            answer.cancel()
            for task in (relaying, leaving):
                task.cancel()
            await asyncio.gather(relaying, leaving, return_exceptions=True)

    async def _relay(self, answer: Answer) -> None:
        async for messages in answer:
            for message in messages:
                await self._relay_one(message)

    async def _relay_one(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self._is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self._is_over = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, error: MoEServeError) -> None:
        """Tell the client: as an answer, or as the last event of a stream that has begun."""
        if not self.has_begun:
            await error_response(error, self._scope["path"])(self._scope, self._receive, self._send)
        elif self._is_stream and not self._is_over:
            data = json.dumps(error_body(error, self._scope["path"]))
            event = f"event: error\ndata: {data}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:  # the client sees an answer that is shorter than announced
            raise error
