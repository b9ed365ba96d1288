"""From checked requests to an HTTP answer, whole or streamed: what all endpoints that generate have in common.

Knows AsyncEngine and what an answer's shape can do; knows no fields of any API.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from moe_serve.errors import EngineDeadError, MoEServeError, OverloadedError, TooManyRequestsError
from moe_serve.scheduling.sequence import Completion, SampleOutput
from moe_serve.server.endpoints.answers import sse
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger, Usage, collect, stream, unless_disconnected
from moe_serve.server.endpoints.answers.json_pieces import dumped
from moe_serve.server.endpoints.bodies.common_fields import CommonFields
from moe_serve.server.endpoints.bodies.given import TheService
from moe_serve.server.endpoints.bodies.sampling_body import SamplingBody
from moe_serve.server.monitoring import request_log
from moe_serve.server.monitoring.access_log import given_id
from moe_serve.server.transport import http_errors

T = TypeVar("T")


class Shapes(Protocol):
    """OpenAI's JSON of one answer that is streamed in chunks."""

    def first_chunks(self) -> list[dict[str, Any]]: ...
    def chunk(self, index: int, output: SampleOutput) -> dict[str, Any] | None: ...
    def usage_chunk(self, usage: Usage) -> dict[str, Any]: ...


class EventShapes(Protocol):
    """One answer that is streamed as events with names; each has a `type`."""

    ping: bytes
    """What is sent after a silence."""

    def begin(self) -> Iterable[dict[str, Any]]: ...
    def feed(self, output: SampleOutput) -> Iterable[dict[str, Any]]: ...
    def fail(self, error: MoEServeError, body: Mapping[str, Any]) -> Iterable[dict[str, Any]]: ...


def request_id(prefix: str, fields: CommonFields, http: HttpRequest) -> str:
    """The client's own id for its request, else a number of ours."""
    return prefix + (fields.request_id or given_id(http.headers) or uuid.uuid4().hex)


def owner_of(http: HttpRequest) -> str:
    """Tells the request's API key from other keys; empty where there are none."""
    owner: str = getattr(http.state, "key_owner", "")
    return owner


async def answer(
    service: TheService,
    http: HttpRequest,
    merger: AnswerMerger,
    whole: Callable[[Sequence[Completion]], dict[str, Any]],
    events: AsyncGenerator[bytes] | None,
    ping: bytes = b"",
) -> Response:
    """Run a body's requests. `whole` shapes the answer, unless it is to be the stream `events`, with a `ping` after
    each silence."""
    await asyncio.sleep(0)  # a connection's end that came with the request is known then
    _tell_clients_apart(merger, http)
    for request in merger.requests:  # refuse the whole body before any part of it runs
        if request.params.grammar is None:
            service.engine.core.check_request(request)
        else:  # compiling may take a while, and the others must not wait
            await unless_disconnected(http, service.engine.check(request))
    request_log.note(http, merger, service.tokenizer if service.log_requests else None)
    headers = {"X-Request-Id": merger.requests[0].request_id}
    try:
        if events is None:
            choices = await unless_disconnected(http, collect(service.engine, merger))
            return await _whole_answer(service, merger, choices, whole, headers)
        # Wait for the first event: until then an overload or a dead engine is still an HTTP status.
        first = await unless_disconnected(http, anext(events))
    except (OverloadedError, TooManyRequestsError, EngineDeadError) as error:
        service.metrics.on_rejected(error.error_type.removesuffix("_error"))
        raise
    return sse.EventStream(first, events, headers, ping)


async def _whole_answer(
    service: TheService,
    merger: AnswerMerger,
    choices: Sequence[Completion],
    whole: Callable[[Sequence[Completion]], dict[str, Any]],
    headers: Mapping[str, str],
) -> Response:
    num_scores = merger.num_scores(*choices)
    content = await service.preparation.shape(num_scores, lambda: dumped(whole(choices)))
    return Response(content, media_type="application/json", headers=headers)


def _tell_clients_apart(merger: AnswerMerger, http: HttpRequest) -> None:
    """Steps are shared between clients. Where keys are told apart, cached_tokens must not tell what another key's user
    has sent."""
    owner = getattr(http.state, "prefix_owner", "")
    salt = f"{owner}:" if owner else ""
    client = _client_of(http)
    merger.requests = [replace(r, client=client, cache_salt=salt + r.cache_salt) for r in merger.requests]


def _client_of(http: HttpRequest) -> str:
    """The API key; without keys, the address. Connections that are closed on one side are a client of their own: one
    share for all that an address may have left behind."""
    client = owner_of(http) or (http.client.host if http.client is not None else "")
    return f"{client}, half closed" if getattr(http.state, "is_half_closed", False) else client


async def chunks(
    service: TheService, body: SamplingBody, merger: AnswerMerger, shapes: Shapes
) -> AsyncGenerator[bytes]:
    """SSE bytes of one completion. Errors before the first output raise; later ones become an event."""
    options = body.stream_options
    started = False
    begun: set[int] = set()
    try:
        async with aclosing(stream(service.engine, merger)) as outputs:
            async for index, output in outputs:
                if output.error is not None:
                    raise output.error
                head = [] if started else shapes.first_chunks()
                started = True
                num_scores = merger.num_scores(output) if index not in begun else len(output.logprobs)
                begun.add(index)
                chunk = await service.preparation.shape(num_scores, partial(shapes.chunk, index, output))
                if chunk is not None and options is not None and options.continuous_usage_stats:
                    chunk["usage"] = merger.usage.as_json()
                if head or chunk is not None:
                    yield sse.events([*head, *([] if chunk is None else [chunk])])
    except MoEServeError as error:
        if not started:
            raise
        merger.error_type = error.error_type
        yield sse.event(http_errors.error_body(error))
    else:
        if options is not None and options.include_usage:
            yield sse.event(shapes.usage_chunk(merger.usage))
    yield sse.DONE


def name_ignored_tools(answer: Response, tools: Sequence[str]) -> None:
    """Tell the client by a header which kinds of its tools the model did not get to see."""
    if tools:
        answer.headers["X-Ignored-Tools"] = ", ".join(tools)


async def named_events(
    service: TheService, http: HttpRequest, merger: AnswerMerger, shapes: EventShapes
) -> AsyncGenerator[bytes]:
    """SSE bytes of one answer, its beginning after sse.SILENCE_S at the latest. Errors before that raise; later ones
    become the events of `fail`."""
    started, num_scores = False, 0
    try:
        async with aclosing(stream(service.engine, merger)) as items, aclosing(_with_silence(items)) as outputs:
            async for item in outputs:
                if item is not None and item[1].error is not None:
                    raise item[1].error
                head = [] if started else list(shapes.begin())
                started = True
                feed: list[dict[str, Any]] = []
                if item is not None:
                    num_scores += merger.num_scores(item[1])
                    feed = await _feed(service, shapes, item[1], num_scores)
                if events := [*head, *feed]:
                    yield sse.named_events(events)
    except MoEServeError as error:
        if not started:
            raise
        merger.error_type = error.error_type
        yield sse.named_events(shapes.fail(error, http_errors.error_body(error, http.url.path)))


async def _with_silence(items: AsyncGenerator[T]) -> AsyncGenerator[T | None]:
    """The items, and None before the first one if it takes longer than sse.SILENCE_S."""
    first = asyncio.ensure_future(anext(items))
    try:
        await asyncio.wait((first,), timeout=sse.SILENCE_S)
        if not first.done():
            yield None
        yield await first
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    async for item in items:
        yield item


async def _feed(
    service: TheService, shapes: EventShapes, output: SampleOutput, num_scores: int
) -> list[dict[str, Any]]:
    """`num_scores`: of all outputs so far, because the last event repeats those before it."""
    fed = partial(_fed, shapes, output)
    return fed() if output.finish_reason is None else await service.preparation.shape(num_scores, fed)


def _fed(shapes: EventShapes, output: SampleOutput) -> list[dict[str, Any]]:
    return list(shapes.feed(output))
