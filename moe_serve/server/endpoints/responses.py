"""POST /v1/responses: OpenAI's newer form of a chat completion, stateless. Plans, runs and parses as chats do.

Knows FastAPI, and the chat endpoint's plan; what an answer's items and events are is in responses_items.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from moe_serve.errors import MoEServeError
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import Completion, SampleOutput, TokenLogprob
from moe_serve.server.endpoints import chat
from moe_serve.server.endpoints.answers import generation, sse
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger, json_logprob, stream
from moe_serve.server.endpoints.answers.responses_items import Event, OutputItems
from moe_serve.server.endpoints.bodies.parsing import parse
from moe_serve.server.endpoints.bodies.responses_body import ResponsesBody, our_names
from moe_serve.server.endpoints.chat import ChatPlan
from moe_serve.server.endpoints.reference import openapi
from moe_serve.server.monitoring.access_log import given_id
from moe_serve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moe_serve.server.app import Service


def install(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses", openapi_extra=openapi.takes(ResponsesBody, streams=True))
    async def create_response(http: HttpRequest) -> Response:
        body = await parse(http, ResponsesBody)
        service.check_model(body.model)
        request_id = f"resp_{body.request_id or given_id(http.headers) or uuid.uuid4().hex}"
        limit, defaults = service.engine.engine.max_model_len, service.sampling_defaults
        asked = body.as_chat()
        with our_names():
            plan = chat.plan(asked, request_id, service.tokenizer, service.response_template, defaults, limit)
            merger = AnswerMerger([plan.request])
            shape = ResponseShape(body, plan, service.model_name, service.tokenizer, merger)
            events = _events(service, merger, shape) if body.stream else None
            return await generation.answer(service, http, merger, shape.whole, events)


async def _events(service: Service, merger: AnswerMerger, shape: ResponseShape) -> AsyncGenerator[bytes]:
    """SSE bytes of one response. Errors before the first output raise; later ones become response.failed."""
    started = False
    try:
        async with aclosing(stream(service.engine, merger)) as outputs:
            async for _, output in outputs:
                if output.error is not None:
                    raise MoEServeError(output.error)
                head = [] if started else list(shape.begin())
                started = True
                if events := [*head, *shape.feed(output)]:
                    yield sse.named_events(events)
    except MoEServeError as error:
        if not started:
            raise
        merger.error_type = error.error_type
        yield sse.named_events(shape.fail(error))


class ResponseShape:
    """The JSON of one response, whole or as events."""

    def __init__(
        self, body: ResponsesBody, plan: ChatPlan, model: str, tokenizer: Tokenizer, merger: AnswerMerger
    ) -> None:
        self._body = body
        self._request = plan.request
        self._parser = plan.new_parser()
        self._model = model
        self._tokenizer = tokenizer
        self._merger = merger
        self._items = OutputItems()
        self._created_s = int(time.time())
        self._num_events = 0

    def whole(self, choices: Sequence[Completion]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        (choice,) = choices
        for _ in self._feed(choice.text, choice.logprobs, choice.finish_reason):
            pass
        return self._response(_status(choice.finish_reason))

    def begin(self) -> Iterator[Event]:
        """Before the first output."""
        response = self._response("in_progress")
        yield self._numbered({"type": "response.created", "response": response})
        yield self._numbered({"type": "response.in_progress", "response": response})

    def feed(self, output: SampleOutput) -> Iterator[Event]:
        """What a step's output shows, and with the last one the response."""
        for event in self._feed(output.text, output.logprobs, output.finish_reason):
            yield self._numbered(event)
        if output.finish_reason is not None:
            status = _status(output.finish_reason)
            yield self._numbered({"type": f"response.{status}", "response": self._response(status)})

    def fail(self, error: MoEServeError) -> Iterator[Event]:
        """The last event, when the engine failed on the request."""
        told = {"code": "server_error", "message": error.message}
        yield self._numbered({"type": "response.failed", "response": {**self._response("failed"), "error": told}})

    def _feed(self, text: str, logprobs: Sequence[TokenLogprob], finish_reason: FinishReason | None) -> Iterator[Event]:
        shown = [self._logprob(entry) for entry in logprobs] if self._body.wants_logprobs else []
        yield from self._items.feed(self._parser.feed(text, finish_reason is not None), shown)
        if finish_reason is not None:
            yield from self._items.close(_status(finish_reason))

    def _numbered(self, event: Event) -> Event:
        self._num_events += 1
        return {**event, "sequence_number": self._num_events - 1}

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self._body, self._request.params
        is_over = status != "in_progress"
        return {
            "id": self._request.request_id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [dict(item) for item in self._items.items] if is_over else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": _dump(body.text) or {"format": {"type": "text"}},
            "tool_choice": _dump(body.tool_choice) or "auto",
            "tools": [_dump(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_over else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._merger.usage
        reasoning = self._tokenizer.encode(self._items.reasoning, add_special_tokens=False)
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": len(reasoning)},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(token_id, value) for token_id, value in entry.top],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": json_logprob(logprob), "bytes": raw}


def _status(reason: FinishReason | None) -> str:
    return "incomplete" if reason is FinishReason.LENGTH else "completed"


def _dump(given: Any) -> Any:
    """A field of the request, as it came."""
    return given.model_dump(exclude_unset=True, by_alias=True) if hasattr(given, "model_dump") else given
