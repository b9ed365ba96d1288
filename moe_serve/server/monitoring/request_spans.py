"""What a request's span says, with vLLM's names, and when it is made: once, after the answer's last byte.

Counts, parameters and times, never text. Knows ASGI and what endpoints leave in `request.state.answered`; who
makes spans of it is a `Tracing` (otlp.py), so nothing here needs OpenTelemetry.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.scheduling.finish import FinishedStats
from moe_serve.server.monitoring.answered import Answered

Attributes = Mapping[str, str | int | float | Sequence[str]]


class Tracing(Protocol):
    """Takes finished spans."""

    def add(self, headers: Mapping[str, str], start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """A request that took from `start_ns` to `end_ns` (Unix time); its headers may name the caller's span."""

    def close(self) -> None:
        """Send what is left; may wait for the network."""


class TraceRequests:
    """Middleware: a span for every request that came as far as having a prompt."""

    def __init__(self, app: ASGIApp, tracing: Tracing, model_name: str) -> None:
        self._app = app
        self._tracing = tracing
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_ns, status = time.time_ns(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            answered: Answered | None = scope.get("state", {}).get("answered")
            if answered is not None:
                attributes = {**span_attributes(answered, self._model_name), **_outcome(answered, status)}
                self._tracing.add(Headers(scope=scope), start_ns, time.time_ns(), attributes)


def span_attributes(answered: Answered, model_name: str) -> Attributes:
    """Of one HTTP request, over all its prompts and samples."""
    params, usage = answered.requests[0].params, answered.usage
    limit = {} if params.max_tokens is None else {"gen_ai.request.max_tokens": params.max_tokens}
    return {
        "gen_ai.request.id": answered.requests[0].request_id,
        "gen_ai.response.model": model_name,
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        **limit,
        "gen_ai.usage.num_sequences": len(answered.requests) * params.n,
        "gen_ai.usage.prompt_tokens": sum(len(request.prompt_token_ids) for request in answered.requests),
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        **(_latencies(answered.ended) if answered.ended else {}),
    }


def _latencies(ended: Sequence[FinishedStats]) -> Attributes:
    """In seconds. Up to the first token: of the sample that had it first; after it: of the one that ended last."""
    first = min(ended, key=lambda stats: stats.time_to_first_token_s)
    last = max(ended, key=lambda stats: stats.e2e_s)
    return {
        "gen_ai.response.finish_reasons": [str(stats.finish_reason) for stats in ended],
        "gen_ai.latency.time_in_queue": first.queue_s,
        "gen_ai.latency.time_in_model_prefill": first.prefill_s,
        "gen_ai.latency.time_to_first_token": first.time_to_first_token_s,
        "gen_ai.latency.time_in_model_decode": last.decode_s,
        "gen_ai.latency.time_in_model_inference": last.prefill_s + last.decode_s,
        "gen_ai.latency.e2e": last.e2e_s,
    }


def _outcome(answered: Answered, status: int) -> Attributes:
    """The HTTP status, and in `error.type` what went wrong, if anything."""
    found: dict[str, str | int] = {"http.response.status_code": status} if status else {}
    if answered.error_type or status >= 400:
        found["error.type"] = answered.error_type or str(status)
    elif len(answered.ended) < len(answered.requests) * answered.requests[0].params.n:
        found["error.type"] = "client_disconnected"
    return found
