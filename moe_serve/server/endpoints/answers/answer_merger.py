"""One or more requests' outputs, merged as they come or collected whole; gone clients abort them.

Between the endpoints and AsyncEngine. Knows no JSON shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.engine.request_queue import MAX_UNREAD
from moe_serve.errors import MoEServeError
from moe_serve.scheduling.finish import FinishedStats
from moe_serve.scheduling.sequence import Completion, Request, SampleOutput, TokenLogprob

T = TypeVar("T")


LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's and vLLM's value."""


def json_logprob(value: float) -> float:
    return max(LOWEST_LOGPROB, value)


@dataclass(slots=True)
class Usage:
    """Token counts over all prompts and samples of one HTTP request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    disk_tokens: int = 0
    """Of the cached ones."""
    completion_tokens: int = 0

    def note_first(self, output: SampleOutput) -> None:
        """Count a prompt once, from the first output of its first sample."""
        self.prompt_tokens += output.num_prompt_tokens
        self.cached_tokens += output.num_cached_tokens
        self.disk_tokens += output.num_disk_tokens

    def as_json(self) -> dict[str, object]:
        cached = {"cached_tokens": self.cached_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": cached | ({"disk_tokens": self.disk_tokens} if self.disk_tokens else {}),
        }


@dataclass(slots=True)
class AnswerMerger:
    """Numbers the samples of several requests through: choice = request's position * n + sample."""

    requests: Sequence[Request]
    usage: Usage = field(default_factory=Usage)
    ended: list[FinishedStats] = field(default_factory=list)
    """Times of the samples that have ended."""
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    """By request id, for requests that asked for them: of their prompt but its first token."""
    error_type: str = ""
    """Of the error that came as an event, after the first byte of a stream."""
    _seen: set[str] = field(default_factory=set)

    def choice_index(self, position: int, output: SampleOutput) -> int:
        return position * self.requests[position].params.n + output.index

    def scores_of(self, request_id: str) -> tuple[TokenLogprob, ...]:
        """What the model thought of a request's prompt; empty for a prompt of one token, which follows nothing."""
        return self.prompt_logprobs.get(request_id, ())

    def num_scores(self, *outputs: SampleOutput | Completion) -> int:
        """Log-probabilities in the outputs, and in the prompts of requests that asked for them: what shaping costs."""
        params = self.requests[0].params
        prompts = sum(map(len, self.prompt_logprobs.values())) * (1 + (params.prompt_logprobs or 0))
        answers = sum(len(output.logprobs) for output in outputs) * (1 + (params.logprobs or 0))
        return prompts * max(1, params.n) + answers

    def count(self, output: SampleOutput) -> None:
        if output.request_id not in self._seen:
            self._seen.add(output.request_id)
            self.usage.note_first(output)
        self.usage.completion_tokens += len(output.token_ids)
        if output.prompt_logprobs:
            self.prompt_logprobs[output.request_id] = output.prompt_logprobs
        if output.stats is not None:
            self.ended.append(output.stats)


async def stream(engine: AsyncEngine, merger: AnswerMerger) -> AsyncGenerator[tuple[int, SampleOutput]]:
    """(choice index, output) of all requests, in order of arrival. Leaving it aborts what is left."""
    if len(merger.requests) == 1:
        async with aclosing(engine.generate(merger.requests[0])) as outputs:
            async for output in outputs:
                merger.count(output)
                yield merger.choice_index(0, output), output
        return
    queue: asyncio.Queue[tuple[int, SampleOutput] | BaseException | None] = asyncio.Queue(MAX_UNREAD)
    tasks = [asyncio.create_task(_pump(engine, i, r, queue)) for i, r in enumerate(merger.requests)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
                continue
            merger.count(item[1])
            yield merger.choice_index(*item), item[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    engine: AsyncEngine,
    position: int,
    request: Request,
    queue: asyncio.Queue[tuple[int, SampleOutput] | BaseException | None],
) -> None:
    try:
        async with aclosing(engine.generate(request)) as outputs:
            async for output in outputs:
                await queue.put((position, output))
    except MoEServeError as error:
        await queue.put(error)
    await queue.put(None)


async def unless_disconnected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client hangs up first, cancels it and raises ClientDisconnect."""
    tasks = working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def collect(engine: AsyncEngine, merger: AnswerMerger) -> list[Completion]:
    """All choices, finished."""
    choices = [Completion(i) for i in range(sum(r.params.n for r in merger.requests))]
    async with aclosing(stream(engine, merger)) as outputs:
        async for index, output in outputs:
            if output.error is not None:
                raise output.error
            choices[index].add(output)
    return choices
