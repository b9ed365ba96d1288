"""POST /v1/responses: OpenAI's newer form of a chat completion. Plans, runs and parses as chats do.

Knows FastAPI, and the chat endpoint's plan; what an answer's items and events are is in responses_items.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from moe_serve.config.units import MIB
from moe_serve.errors import InvalidRequestError, MoEServeError
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import Completion, SampleOutput, TokenLogprob
from moe_serve.server.endpoints import chat
from moe_serve.server.endpoints.answers import generation, sse
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger, json_logprob
from moe_serve.server.endpoints.answers.response_store import ResponseStore
from moe_serve.server.endpoints.answers.responses_items import Event, OutputItems
from moe_serve.server.endpoints.bodies import unsupported_fields
from moe_serve.server.endpoints.bodies.common_fields import CommonFields
from moe_serve.server.endpoints.bodies.given import TheResponses, TheService, parsed, prepared
from moe_serve.server.endpoints.bodies.json_types import Flag, Int, JsonList, at_most
from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.renamed_fields import errors_under
from moe_serve.server.endpoints.bodies.responses_fields import (
    OUR_NAMES,
    AllowedFunctions,
    CustomTool,
    Included,
    NamedFunction,
    Reasoning,
    TextSettings,
    Tool,
    ignored_tools,
    seen_tools,
)
from moe_serve.server.endpoints.bodies.responses_input import messages_of
from moe_serve.server.endpoints.bodies.sampling_body import MAX_TAGS
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal
from moe_serve.server.endpoints.chat import ChatBody, ChatPlan
from moe_serve.text.tokenizer import Tokenizer

router = APIRouter()


def add(app: FastAPI, service: TheService) -> None:
    """The route, and the store that the routes of stored_responses.py share with it."""
    app.state.responses = ResponseStore(service.stored_responses_mib * MIB)
    app.include_router(router)


SAME_FIELDS = (*CommonFields.model_fields, "parallel_tool_calls", "chat_template_kwargs")
"""Fields that a chat body has under the same name and with the same meaning."""


class ResponsesBody(Body, CommonFields):
    """POST /v1/responses."""

    input: str | JsonList[dict[str, Any]]
    """Text, or messages, calls of functions and custom tools, their outputs, and reasoning. Text content only."""
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    """Default: to the end of the context."""
    tools: JsonList[Tool] | None = None
    """Functions, and custom tools, which take text; the chat template must show them. Tools that OpenAI runs are left
    out, and the header X-Ignored-Tools of the answer names them."""
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions | None = None
    """none, auto (needs a response template), required, a function by name, or allowed_tools."""
    parallel_tool_calls: Flag | None = None
    """false: at most one call."""
    text: TextSettings | None = None
    """format: text, json_object or json_schema."""
    reasoning: Reasoning | None = None
    """effort is given to the chat template, which may leave it unused; summary is accepted and unused."""
    include: JsonList[Included] | None = None
    """message.output_text.logprobs; others are accepted and unused: reasoning comes as text."""
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    """0 to 20 alternatives; needs message.output_text.logprobs in include."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    client_metadata: dict[str, Any] | None = None
    """Accepted and unused."""
    metadata: Annotated[dict[str, str], at_most(MAX_TAGS)] | None = None
    """Comes back in the answer."""
    store: Flag | None = None
    """false: the answer is not kept. Default: it is, within --stored-responses-mib."""
    previous_response_id: Annotated[str, Field(max_length=300)] | None = None
    """A stored response: its conversation comes before the input. Its instructions are not taken over."""

    unsupported: ClassVar[Mapping[str, Refusal]] = unsupported_fields.RESPONSES

    def _effort(self) -> dict[str, str]:
        effort = self.reasoning.effort if self.reasoning is not None else None
        return {} if effort is None else {"reasoning_effort": effort}

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def items(self, before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The input as items, after those of the responses before it."""
        own = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        return [*before, *own]

    def as_chat(self, before: Sequence[dict[str, Any]] = ()) -> ChatBody:
        """The chat completion that this asks for. InvalidRequestError names the field here."""
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise InvalidRequestError("top_logprobs", "top_logprobs needs message.output_text.logprobs in include")
        choice = self.tool_choice
        fields = {name: value for name in SAME_FIELDS if (value := getattr(self, name)) is not None}
        fields |= {
            "messages": messages_of(self.items(before), self.instructions),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs,
            "chat_template_kwargs": {**self._effort(), **(self.chat_template_kwargs or {})} or None,
            "tools": [tool.as_chat() for tool in seen_tools(self.tools)] or None,
            "tool_choice": choice if choice is None or isinstance(choice, str) else choice.as_chat(),
        }
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.as_chat()
        with errors_under(OUR_NAMES):
            return ChatBody.model_validate(fields)


@router.post("/v1/responses")
async def create_response(
    body: Annotated[ResponsesBody, Depends(parsed(ResponsesBody))],
    service: TheService,
    responses: TheResponses,
    http: HttpRequest,
) -> Response:
    """Answer a conversation in the form of OpenAI's Responses API."""
    service.check_model(body.model)
    request_id = generation.request_id("resp_", body, http)
    owner = generation.owner_of(http)
    previous = body.previous_response_id
    before = [] if previous is None else responses.conversation(owner, previous)
    with errors_under(OUR_NAMES):
        plan = await prepared(http, lambda: chat.plan(body.as_chat(before), request_id, service))
        merger = AnswerMerger([plan.request])
        shape = ResponseShape(body, plan, service.model_name, service.tokenizer, merger)
        if body.store is not False:
            items = body.items(before)
            shape.keep = lambda response: responses.keep(owner, response, items)
        events = generation.named_events(service, http, merger, shape) if body.stream else None
        answer = await generation.answer(service, http, merger, shape.whole, events, shape.ping)
    generation.name_ignored_tools(answer, ignored_tools(body.tools))
    return answer


class ResponseShape:
    """The JSON of one response, whole or as events."""

    ping = sse.COMMENT

    def __init__(
        self, body: ResponsesBody, plan: ChatPlan, model: str, tokenizer: Tokenizer, merger: AnswerMerger
    ) -> None:
        self._body = body
        self._request = plan.request
        self._parser = plan.new_parser()
        self._model = model
        self._tokenizer = tokenizer
        self._merger = merger
        self._items = OutputItems([tool.name for tool in seen_tools(body.tools) if isinstance(tool, CustomTool)])
        self.keep: Callable[[dict[str, Any]], None] = lambda response: None
        """Called with the response when it is over."""
        self._created_s = int(time.time())
        self._num_events = 0

    def whole(self, choices: Sequence[Completion]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        (choice,) = choices
        for _ in self._feed(choice.text, choice.logprobs, choice.finish_reason):
            pass
        return self._over(_status(choice.finish_reason))

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
            yield self._numbered({"type": f"response.{status}", "response": self._over(status)})

    def fail(self, error: MoEServeError, body: Mapping[str, Any]) -> Iterator[Event]:
        """The last event, when the engine failed on the request."""
        told = {"code": "server_error", "message": error.message}
        yield self._numbered({"type": "response.failed", "response": {**self._response("failed"), "error": told}})

    def _over(self, status: str) -> dict[str, Any]:
        response = self._response(status)
        self.keep(response)
        return response

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
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store is not False,
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
