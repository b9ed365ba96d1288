"""A small OpenAI-like server with known delays, for the commands that are clients."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

FIRST_TOKEN_S = 0.05
NEXT_TOKEN_S = 0.01
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


@dataclass
class StubServer:
    """An ASGI app. A prompt that contains `fail`, `midway` or `empty` goes wrong in that way."""

    has_tokenize: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    """Of the last request."""
    url: str = ""

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = await self._read(receive)
        self.headers = dict(scope["headers"])
        if scope["path"] == "/v1/models":
            await self._json(send, 200, {"data": [{"id": "stub-model"}]})
        elif scope["path"] == "/tokenize" and self.has_tokenize:
            await self._json(send, 200, {"tokens": [1, *(1000 + len(w) for w in body["prompt"].split())]})
        elif scope["path"] in ("/v1/completions", "/v1/chat/completions"):
            await self._complete(body, "chat" in scope["path"], send)
        else:
            await self._json(send, 404, {"error": {"message": "no such path"}})

    async def _complete(self, body: dict[str, Any], chat: bool, send: Send) -> None:
        self.bodies.append(body)
        self.times.append(time.perf_counter())
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        if "fail" in prompt:
            await self._json(send, 503, {"error": {"message": "the queue is full"}})
            return
        await self._start(send, 200, b"text/event-stream")
        for event in self._events(prompt, body, chat):
            await asyncio.sleep(event.pop("_delay_s", 0))
            await self._data(send, json.dumps(event))
        await self._data(send, "[DONE]")
        await send({"type": "http.response.body"})

    def _events(self, prompt: str | list[int], body: dict[str, Any], chat: bool) -> Iterator[dict[str, Any]]:
        if chat:
            yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        count = 0 if prompt == "empty" else body["max_tokens"]
        for i in range(count):
            if prompt == "midway" and i == 2:
                yield {"error": {"message": "out of pages"}}
                return
            choice = {"delta": {"content": f"t{i} "}} if chat else {"text": f"t{i} "}
            yield {"choices": [choice], "_delay_s": NEXT_TOKEN_S if i else FIRST_TOKEN_S}
        yield {"choices": [{"finish_reason": "length", **({"delta": {}} if chat else {"text": ""})}]}
        if body.get("stream_options", {}).get("include_usage"):
            tokens = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            yield {"choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": count}}

    @staticmethod
    async def _read(receive: Receive) -> Any:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                return json.loads(body) if body else {}

    @staticmethod
    async def _start(send: Send, status: int, kind: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})

    async def _json(self, send: Send, status: int, body: dict[str, Any]) -> None:
        await self._start(send, status, b"application/json")
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    @staticmethod
    async def _data(send: Send, text: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


@pytest.fixture
def stub() -> Iterator[StubServer]:
    app = StubServer()
    config = uvicorn.Config(app, lifespan="off", ws="none", log_level="critical")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield app
        server.should_exit = True
        thread.join()
