"""One log line per request, with its id, and the id on every answer. Never what was asked or answered.

Knows ASGI. An endpoint that knows more about its request leaves it in `request.state.logged`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.server.monitoring.http_counts import HttpCounts
from moe_serve.server.monitoring.logs import FIELDS

log = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""As nginx: no answer was begun when the client left."""
ID_HEADER = "X-Request-Id"
QUIET_PATHS = frozenset({"/health", "/live", "/ping", "/metrics", "/load", "/dashboard/data"})
"""Asked every few seconds by machines, and every second by an open dashboard."""


class AccessLog:
    """Middleware: gives every answer a request id, and counts it and writes a line when it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._counts = HttpCounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["http_counts"] = self._counts  # for /metrics
        line = _Line(scope, send)
        try:
            await self._app(scope, receive, line.send)
        finally:
            self._counts.note(scope, line.status or CLIENT_CLOSED)
            line.write()


class _Line:
    """What is known of one request."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._start_s = time.monotonic()
        self.status = 0
        self._request_id = ""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            self._request_id = headers.setdefault(ID_HEADER, given_id(Headers(scope=self._scope)) or uuid.uuid4().hex)
        await self._send(message)

    def write(self) -> None:
        path = self._scope["path"]
        if path in QUIET_PATHS:
            return
        fields = {
            "request_id": self._request_id,
            "client": (self._scope.get("client") or ("-",))[0],
            "method": self._scope["method"],
            "path": path,
            "status": self.status,
            "duration_s": round(time.monotonic() - self._start_s, 4),
            **self._more(),
        }
        log.info("request", extra={FIELDS: fields})

    def _more(self) -> dict[str, Any]:
        logged: Callable[[], dict[str, Any]] = self._scope.get("state", {}).get("logged", dict)
        return logged()


def given_id(headers: Headers) -> str:
    """The id that the client chose for its request, if it is fit to be repeated; else empty."""
    given = headers.get("x-request-id", "")[:200]
    return given if given.isascii() and given.isprintable() and " " not in given else ""
