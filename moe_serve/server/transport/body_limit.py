"""Limits on a request's body: its size, and how long it may take to arrive. Knows ASGI, knows no endpoint."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.errors import BodyTooLargeError, SlowClientError
from moe_serve.server.transport.http_errors import CLOSE, error_response
from moe_serve.server.transport.memory import MemoryReturn


class BodyLimit:
    """Middleware: 413 for a body that is too large, 408 for one that does not come."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._memory = MemoryReturn()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await error_response(too_large(self._max_bytes), scope["path"], CLOSE)(scope, receive, send)
            return
        body = _Body(receive, self._max_bytes, self._timeout_s)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._memory.note(body.num_bytes)


def too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body exceeds {max_bytes} bytes, this server's limit (--max-body-mib)")


class _Body:
    """Wraps `receive` of one request; its errors reach the endpoint that reads the body, and become its answer."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._left_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._is_complete = False

    @property
    def num_bytes(self) -> int:
        """Taken in so far."""
        return self._max_bytes - self._left_bytes

    async def receive(self) -> Message:
        if self._is_complete:  # what comes now is the client's leaving, for which there is no limit
            return await self._receive()
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._timeout_s
        try:
            async with asyncio.timeout(self._deadline - now):
                message = await self._receive()
        except TimeoutError:
            raise SlowClientError(f"the request body did not arrive within {self._timeout_s:g} s") from None
        self._left_bytes -= len(message.get("body", b""))
        if self._left_bytes < 0:
            raise too_large(self._max_bytes)
        self._is_complete = not message.get("more_body", False)
        return message
