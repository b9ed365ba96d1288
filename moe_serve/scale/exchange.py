"""One HTTP request on its way to a replica, and the application run on it there.

Knows ASGI; knows neither Ray nor models.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

CARRIED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
"""What a scope says in plain values. Headers, addresses and state are carried too."""
CARRIED_STATE = ("key_owner", "prefix_owner")
"""What a request's state says of its API key."""


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request, in values that another process can read.

    hashes: of its prompt's growing prefixes, from `prefix_hashes`.
    """

    scope: dict[str, Any]
    body: bytes
    hashes: tuple[bytes, ...] = ()


def carried(scope: Scope, body: bytes, hashes: tuple[bytes, ...] = ()) -> Request:
    """The request of an ASGI scope."""
    values = {name: scope[name] for name in CARRIED if name in scope}
    values["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    values["client"], values["server"] = scope.get("client"), scope.get("server")
    state = scope.get("state", {})
    values["state"] = {name: state[name] for name in CARRIED_STATE if name in state}
    return Request(values, body, hashes)


async def answer(app: ASGIApp, request: Request) -> AsyncGenerator[list[Message]]:
    """The application's messages as they come, those that wait together in one list.

    Closing the generator tells the application that its client has left, and waits until it has ended.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    client = _Client(request.body)
    running = asyncio.create_task(_run(app, request, client, messages))
    try:
        while (message := await messages.get()) is not None:
            waiting = [message]
            while not messages.empty() and (message := messages.get_nowait()) is not None:
                waiting.append(message)
            yield waiting
            if message is None:
                break
        await running  # what it raised, the caller hears
    finally:
        client.leave()
        with suppress(Exception):
            await running


async def _run(app: ASGIApp, request: Request, client: _Client, messages: asyncio.Queue[Message | None]) -> None:
    try:
        await app({**request.scope, "state": dict(request.scope["state"])}, client.receive, messages.put)
    finally:
        await messages.put(None)


class _Client:
    """`receive` for an application: the whole body, then nothing until the client leaves."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._has_left = asyncio.Event()

    def leave(self) -> None:
        self._has_left.set()

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._has_left.wait()
        return {"type": "http.disconnect"}
