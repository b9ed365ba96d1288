"""Streams say something while a long prompt is computed, so that proxies keep the connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from moe_serve.server.endpoints.answers import sse
from tests.patience import PATIENCE_S
from tests.server.test_overload_and_abort import Visitor, run, until

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
MESSAGES: Any = (
    "/v1/messages",
    {"max_tokens": 3, "messages": [{"role": "user", "content": "hi"}], "stream": True},
    PING,
)
RESPONSES: Any = ("/v1/responses", {"max_output_tokens": 3, "input": "hi", "stream": True}, sse.COMMENT)
STREAMS = pytest.mark.parametrize(("path", "body", "ping"), [MESSAGES, RESPONSES])


@pytest.fixture(autouse=True)
def _short_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SILENCE_S", 0.01)


def kinds_of(received: bytes) -> list[str]:
    """The types of events, without pings."""
    lines = [line for line in received.decode().splitlines() if line.startswith("data: ")]
    return [kind for line in lines if (kind := json.loads(line.removeprefix("data: "))["type"]) != "ping"]


@STREAMS
def test_a_silent_stream_begins_and_pings(make: Any, path: str, body: dict[str, Any], ping: bytes) -> None:
    served = make()

    async def scenario(_: Any) -> None:
        served.engine.gate.clear()
        visitor = Visitor(served.app, body, path)
        await until(lambda: visitor.received.count(ping) >= 3)
        begun = kinds_of(visitor.received)
        assert begun in (["message_start"], ["response.created", "response.in_progress"])
        served.engine.gate.set()
        await asyncio.wait_for(visitor.task, PATIENCE_S)
        kinds = kinds_of(visitor.received)
        assert kinds[: len(begun)] == begun
        assert kinds.count(begun[0]) == 1
        assert kinds[-1] in ("message_stop", "response.incomplete")

    run(served, scenario)


def test_the_prompts_tokens_are_known_before_they_are_computed(make: Any) -> None:
    served = make()

    async def scenario(client: Any) -> None:
        path, body, ping = MESSAGES
        counted = {"messages": body["messages"]}
        count = (await client.post(f"{path}/count_tokens", json=counted)).json()["input_tokens"]
        served.engine.gate.clear()
        visitor = Visitor(served.app, body, path)
        await until(lambda: ping in visitor.received)
        served.engine.gate.set()
        await asyncio.wait_for(visitor.task, PATIENCE_S)
        start = json.loads(visitor.received.split(b"\n\n")[0].partition(b"data: ")[2])
        assert start["message"]["usage"]["input_tokens"] == count > 0

    run(served, scenario)


@STREAMS
def test_a_client_that_leaves_in_the_silence_aborts(make: Any, path: str, body: dict[str, Any], ping: bytes) -> None:
    served = make()

    async def scenario(_: Any) -> None:
        served.engine.gate.clear()
        visitor = Visitor(served.app, body, path)
        await until(lambda: ping in visitor.received)
        await visitor.leave()
        served.engine.gate.set()
        await until(lambda: served.engine.aborted)
        assert served.async_engine.num_in_flight == 0

    run(served, scenario)
