"""The ingress before replicas in this process: ordinary answers, lost replicas, clients that leave."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Message

from moe_serve.scale.exchange import Request, answer
from moe_serve.scale.ingress import MOST_TRIES, Ingress

STREAM = "data: one\n\ndata: two\n\n"


class LostError(Exception):
    """Stands for Ray's error for an actor that is gone."""


class FullError(Exception):
    """Stands for Ray's error when every queue is full."""


def application() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/echo")
    async def echo(http: HttpRequest) -> dict[str, Any]:
        return {"body": (await http.body()).decode(), "query": str(http.url.query), "x": http.headers["x-one"]}

    @app.post("/v1/chat/completions")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield "data: one\n\n"
            await asyncio.sleep(0)
            yield "data: two\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("a bug")

    return app


class Exchange:
    """What Ray's handle returns: iterated, and cancelled at the end."""

    def __init__(self, messages: AsyncGenerator[list[Message]]) -> None:
        self._messages = messages
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[list[Message]]:
        return self._messages

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas:
    """Sends each request to the application; `spoil` may replace an exchange's messages, by the number of the try."""

    def __init__(self, spoil: Callable[[int, AsyncGenerator[list[Message]]], AsyncGenerator[list[Message]]]) -> None:
        self._app, self._spoil = application(), spoil
        self.requests: list[Request] = []

    def send(self, request: Request) -> Exchange:
        self.requests.append(pickle.loads(pickle.dumps(request)))  # Ray carries it to another process
        return Exchange(self._spoil(len(self.requests), answer(self._app, self.requests[-1])))


def untouched(_: int, messages: AsyncGenerator[list[Message]]) -> AsyncGenerator[list[Message]]:
    return messages


async def lost_at_once(_: int, messages: AsyncGenerator[list[Message]]) -> AsyncGenerator[list[Message]]:
    raise LostError
    yield []


async def full(_: int, messages: AsyncGenerator[list[Message]]) -> AsyncGenerator[list[Message]]:
    raise FullError
    yield []


async def lost_after_first(_: int, messages: AsyncGenerator[list[Message]]) -> AsyncGenerator[list[Message]]:
    yield [(await anext(messages))[0]]
    await messages.aclose()
    raise LostError


def first_is_lost(number: int, messages: AsyncGenerator[list[Message]]) -> AsyncGenerator[list[Message]]:
    return lost_at_once(number, messages) if number == 1 else messages


def is_a(kind: type[Exception]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kind)


async def metrics_of_two() -> dict[str, str]:
    text = '# HELP things Things.\n# TYPE things counter\nthings_total{kind="a"} 2.0\n'
    return {"one": text, "two": text.replace("2.0", "3.0")}


def ask(replicas: Replicas, use: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]) -> httpx.Response:
    door = Ingress(replicas.send, metrics_of_two, is_loss=is_a(LostError), is_full=is_a(FullError))

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://door") as client:
            return await use(client)

    return asyncio.run(run())


def test_the_answer_is_the_applications_own() -> None:
    replicas = Replicas(untouched)
    sent = ask(replicas, lambda c: c.post("/v1/echo?q=1", content=b"text", headers={"x-one": "1"}))
    assert sent.json() == {"body": "text", "query": "q=1", "x": "1"}
    assert ask(replicas, lambda c: c.post("/v1/chat/completions", json={})).text == STREAM
    assert ask(replicas, lambda c: c.get("/nowhere")).status_code == 404


def test_metrics_are_of_all_replicas_and_name_each_family_once() -> None:
    text = ask(Replicas(untouched), lambda c: c.get("/metrics")).text
    assert text.count("# TYPE things_total counter") == 1
    assert 'things_total{kind="a",replica="one"} 2.0' in text
    assert 'things_total{kind="a",replica="two"} 3.0' in text


def test_prompts_carry_their_hashes_and_other_requests_none() -> None:
    replicas = Replicas(untouched)
    body = {"messages": [{"role": "user", "content": "a" * 2000}]}
    ask(replicas, lambda c: c.post("/v1/chat/completions", json=body))
    ask(replicas, lambda c: c.post("/v1/echo", json=body, headers={"x-one": "1"}))
    assert len(replicas.requests[0].hashes) >= 2000 // 256
    assert replicas.requests[1].hashes == ()


def test_a_replica_lost_before_its_answer_costs_nothing() -> None:
    replicas = Replicas(first_is_lost)
    assert ask(replicas, lambda c: c.post("/v1/chat/completions", json={})).text == STREAM
    assert len(replicas.requests) == 2


def test_no_replica_left_is_an_error_with_a_sentence() -> None:
    replicas = Replicas(lost_at_once)
    answered = ask(replicas, lambda c: c.post("/v1/chat/completions", json={}))
    assert answered.status_code == 503
    assert "was lost; send the request again" in answered.json()["error"]["message"]
    assert len(replicas.requests) == MOST_TRIES


def test_full_replicas_are_a_503_and_no_further_try() -> None:
    replicas = Replicas(full)
    answered = ask(replicas, lambda c: c.post("/v1/chat/completions", json={}))
    assert answered.status_code == 503
    assert "Retry-After" in answered.headers
    assert len(replicas.requests) == 1


def test_a_stream_that_has_begun_ends_with_an_error_event() -> None:
    replicas = Replicas(lost_after_first)
    answered = ask(replicas, lambda c: c.post("/v1/chat/completions", json={}))
    assert answered.status_code == 200
    assert answered.text.startswith("event: error\ndata: ")
    assert "was lost" in answered.text
    assert len(replicas.requests) == 1


def test_a_bug_in_the_application_is_not_sent_again() -> None:
    replicas = Replicas(untouched)
    with pytest.raises(KeyError):
        ask(replicas, lambda c: c.get("/broken"))
    assert len(replicas.requests) == 1


def test_a_client_that_leaves_aborts_the_request() -> None:
    told: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        told.append((await receive())["type"])

    async def run() -> None:
        request = Request({"type": "http", "path": "/", "headers": [], "state": {}}, b"")
        messages = answer(endless, request)
        await anext(messages)
        await messages.aclose()

    asyncio.run(run())
    assert told == ["http.disconnect"]
