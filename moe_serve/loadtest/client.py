"""Sends requests at their times and notes when every token comes back. Computes no statistics."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_serve.errors import MoEServeError
from moe_serve.loadtest.openai_stream import parse_line, reply_error, text_of
from moe_serve.loadtest.vocabulary import ReadyRequest

if TYPE_CHECKING:
    import httpx

CHAT_PATH = "chat/completions"
READY_POLL_S = 0.5
CONNECT_TIMEOUT_S = 30


@dataclass(slots=True)
class Outcome:
    """One request as the client saw it. Times in seconds; the clock is time.perf_counter."""

    start_s: float = 0.0
    """When it went on the wire, after waiting for a free place if concurrency is limited."""
    client_queue_s: float = 0.0
    """That wait."""
    token_times_s: list[float] = field(default_factory=list)
    """Arrival of each piece of the answer, from `start_s`; usually one token each."""
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def success(self) -> bool:
        return self.error is None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] if self.token_times_s else 0.0

    @property
    def latency_s(self) -> float:
        return self.token_times_s[-1] if self.token_times_s else 0.0

    @property
    def itls_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.token_times_s)]

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 for an answer of one token."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what every one of them says."""

    endpoint: str
    model: str
    settings: Mapping[str, Any]

    @property
    def is_chat(self) -> bool:
        return self.endpoint.rstrip("/").endswith(CHAT_PATH)

    def body(self, request: ReadyRequest) -> dict[str, Any]:
        asked = (
            {"messages": [{"role": "user", "content": request.prompt}]} if self.is_chat else {"prompt": request.prompt}
        )
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **asked, "max_tokens": request.output_tokens, **stream, **self.settings}


class Clients:
    """HTTP clients of one connection each, reused when idle.

    One client with many connections searches through all of them for every request: at 100 in
    flight that took twice the time of the requests themselves, and would have been measured as
    the server's.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        import httpx

        self._settings: dict[str, Any] = {
            "base_url": base_url.rstrip("/"),
            "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            "headers": dict(headers),
            "verify": ssl.create_default_context(),
            "trust_env": False,
        }
        self._idle: list[httpx.AsyncClient] = []

    @asynccontextmanager
    async def take(self) -> AsyncIterator[httpx.AsyncClient]:
        """An idle client, or a new one; there is no limit, since waiting here would be measured too."""
        import httpx

        client = self._idle.pop() if self._idle else httpx.AsyncClient(**self._settings)
        try:
            yield client
        finally:
            self._idle.append(client)

    async def aclose(self) -> None:
        for client in self._idle:
            await client.aclose()


async def wait_until_ready(client: httpx.AsyncClient, timeout_s: float) -> str:
    """Name of the server's first model, once it answers. 0 tries once."""
    import httpx

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            response = await client.get("/v1/models")
            if response.status_code == 200:
                return str(response.json()["data"][0]["id"])
            problem: object = reply_error(response.status_code, response.text).message
        except (httpx.TransportError, ValueError, LookupError, TypeError) as error:
            problem = error
        if time.monotonic() >= deadline:
            raise MoEServeError(f"no model at {client.base_url}: {problem}")
        await asyncio.sleep(READY_POLL_S)


async def send(client: httpx.AsyncClient, target: Target, request: ReadyRequest) -> Outcome:
    """One request. The outcome holds every failure; none is raised."""
    import httpx

    outcome = Outcome(start_s=time.perf_counter(), input_tokens=request.input_tokens)
    try:
        await _receive(client, target, request, outcome)
    except (httpx.HTTPError, MoEServeError, ValueError) as error:
        outcome.error = str(error) or type(error).__name__
    if outcome.success and not outcome.token_times_s:
        outcome.error = "the stream ended without a token"
    return outcome


async def _receive(client: httpx.AsyncClient, target: Target, request: ReadyRequest, outcome: Outcome) -> None:
    pieces: list[str] = []
    async with client.stream("POST", target.endpoint, json=target.body(request)) as response:
        if response.status_code != 200:
            raise reply_error(response.status_code, (await response.aread()).decode(errors="replace"))
        async for line in response.aiter_lines():
            event = parse_line(line)
            if event is not None:
                _note(event, outcome, pieces)
    outcome.text = "".join(pieces)
    outcome.output_tokens = outcome.output_tokens or len(outcome.token_times_s)


def _note(event: dict[str, Any], outcome: Outcome, pieces: list[str]) -> None:
    text = text_of(event)
    if text is not None and (text or not _is_bookkeeping(event)):
        outcome.token_times_s.append(time.perf_counter() - outcome.start_s)
        pieces.append(text)
    usage = event.get("usage")
    if usage:
        outcome.input_tokens = usage.get("prompt_tokens") or outcome.input_tokens
        outcome.output_tokens = usage.get("completion_tokens") or outcome.output_tokens


def _is_bookkeeping(event: dict[str, Any]) -> bool:
    """An event without text that carries no token: chat's opening role, or the closing finish reason."""
    choice = event["choices"][0]
    return bool(choice.get("finish_reason") or (choice.get("delta") or {}).get("role"))


async def send_all(
    clients: Clients,
    target: Target,
    requests: Sequence[ReadyRequest],
    arrivals_s: Sequence[float],
    max_concurrency: int | None,
    on_done: Callable[[], object],
) -> tuple[list[Outcome], float]:
    """Outcomes in the order of requests, and the seconds from the start to the last of them."""
    start_s = time.perf_counter()
    places: AbstractAsyncContextManager[Any] = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()

    async def one(request: ReadyRequest, arrival_s: float) -> Outcome:
        await asyncio.sleep(start_s + arrival_s - time.perf_counter())
        due_s = time.perf_counter()
        async with places:
            queued_s = time.perf_counter() - due_s
            async with clients.take() as client:
                outcome = await send(client, target, request)
        outcome.client_queue_s = queued_s
        on_done()
        return outcome

    outcomes = await asyncio.gather(*(one(r, a) for r, a in zip(requests, arrivals_s, strict=True)))
    return outcomes, time.perf_counter() - start_s
