"""Bounds on a request's head: its line, its headers and trailers. Refused in the parser, before anything looks at them.

httptools limits nothing: 20 MB of headers, or one that never ends, would be taken in before the key is checked. Knows
uvicorn's protocol class; knows no key and no endpoint.
"""

from __future__ import annotations

import http
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moe_serve.server.transport.http_errors import body_of

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as HTTPProtocol
else:  # with httptools installed, its parser in C: a quarter less time per event than h11
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as HTTPProtocol

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 100
LINGER_S = 1.0
"""Time to take in and forget what a refused client still sends: closing at once would lose the answer on its way."""
VERSIONS = ("1.0", "1.1")


class _Refused(Exception):
    """Stops the parser."""


class BoundedHead(HTTPProtocol):
    """A connection that answers 431 for a head that is too large, and 400 or 505 for one that is none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread_bytes = 0
        """Since the parser last came to the end of a head, a piece of a body, or a message."""
        self._head_bytes = self._num_headers = 0
        self._refusal: tuple[int, str] | None = None
        self._is_deaf = False

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unread_bytes += len(data)
        super().data_received(data)
        if self._unread_bytes > MAX_HEAD_BYTES and not self._is_deaf:  # one line without an end
            self._refusal = _too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._head_bytes = self._num_headers = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers come here too, and count."""
        self._head_bytes += len(name) + len(value)
        self._num_headers += 1
        if self._head_bytes + len(self.url) > MAX_HEAD_BYTES or self._num_headers > MAX_HEADERS:
            self._refuse(*_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread_bytes = 0
        version = self.parser.get_http_version()
        if version not in VERSIONS:
            self._refuse(505, f"this server speaks HTTP/1.1, not HTTP/{version}")
        if version == "1.1" and sum(name == b"host" for name, _ in self.headers) != 1:
            self._refuse(400, "a request needs exactly one Host header")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        super().on_message_complete()

    def _refuse(self, status: int, message: str) -> None:
        self._refusal = status, message
        raise _Refused

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when its parser gives up: answer with the reason, in the shape of all errors."""
        status, message = self._refusal or (400, "the request is not valid HTTP")
        self._is_deaf = True
        if self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(_answer(status, message))
        if self.transport.can_write_eof():
            with suppress(OSError):  # the client has gone, and asyncio does not know it yet
                self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _too_large() -> tuple[int, str]:
    limits = f"{MAX_HEAD_BYTES >> 10} KiB or {MAX_HEADERS} lines"
    return 431, f"the request's line and headers are larger than this server takes ({limits})"


def _answer(status: int, message: str) -> bytes:
    body = json.dumps(body_of(message, "invalid_request_error", None, status)).encode()
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
