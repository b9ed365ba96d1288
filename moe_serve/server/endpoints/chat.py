"""POST /v1/chat/completions: messages to a request, outputs to OpenAI's chat JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import Completion, GrammarSpec, Request, SampleOutput, TokenLogprob
from moe_serve.server.endpoints.answers import generation
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger, Usage, json_logprob
from moe_serve.server.endpoints.answers.answer_parsers import (
    AnswerParser,
    Delta,
    ListOfCalls,
    NamedCall,
    PlainText,
    TemplateAnswer,
)
from moe_serve.server.endpoints.answers.prompt_scores import prompt_scores
from moe_serve.server.endpoints.bodies import prompts, unsupported_fields
from moe_serve.server.endpoints.bodies.chat_messages import Message
from moe_serve.server.endpoints.bodies.common_fields import TemplateFields, in_range
from moe_serve.server.endpoints.bodies.given import TheService, parsed, prepared
from moe_serve.server.endpoints.bodies.json_types import Flag, Int, JsonList
from moe_serve.server.endpoints.bodies.sampling_body import SamplingBody
from moe_serve.server.endpoints.bodies.tools import Tool, ToolChoice, ToolPlan, calls_or_answer, plan_tools
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal
from moe_serve.text.answer_format import Template
from moe_serve.text.response_templates import call_syntax, call_tags, start_parser, without_fields
from moe_serve.text.tokenizer import Tokenizer

router = APIRouter()


class ChatBody(SamplingBody, TemplateFields):
    """POST /v1/chat/completions."""

    messages: Annotated[JsonList[Message], Field(min_length=1)]
    """Text content only, as a string or text parts; tool calls and their results where the template has them."""
    tools: JsonList[Tool] | None = None
    """Functions; the chat template must show them."""
    tool_choice: ToolChoice | None = None
    """none, auto (needs a response template), required, or a function by name."""
    parallel_tool_calls: Flag | None = None
    """false: at most one call."""
    max_tokens: Int | None = in_range(1)
    """At least 1. Default: to the end of the context."""
    max_completion_tokens: Int | None = in_range(1)
    """The newer name of max_tokens, and goes before it."""
    logprobs: Flag | None = None
    """Log-probability of each sampled token."""
    top_logprobs: Int | None = in_range(0, 20)
    """0 to 20 alternatives; needs logprobs."""
    reasoning_effort: str | None = None
    """Given to the chat template, which must use it."""
    include_reasoning: Flag | None = None
    """false: leave reasoning_content out."""

    unsupported: ClassVar[Mapping[str, Refusal]] = unsupported_fields.CHAT

    def completion_limit(self) -> int | None:
        """max_completion_tokens, or the older max_tokens."""
        for name in ("max_completion_tokens", "max_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise InvalidRequestError(name, f"{name} must be at least 1, got {limit}")
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def num_logprobs(self) -> int | None:
        """SamplingParams.logprobs for `logprobs` and `top_logprobs`."""
        if not self.logprobs:
            if self.top_logprobs:
                raise InvalidRequestError("top_logprobs", "top_logprobs needs logprobs: true")
            return None
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise InvalidRequestError("top_logprobs", f"top_logprobs must be between 0 and 20, got {self.top_logprobs}")
        return self.top_logprobs or 0


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: Annotated[ChatBody, Depends(parsed(ChatBody))], service: TheService, http: HttpRequest
) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    request_id = generation.request_id("chatcmpl-", body, http)
    chat = await prepared(http, lambda: plan(body, request_id, service))
    merger = AnswerMerger([chat.request])
    shapes = ChatShapes(body, chat, request_id, service.model_name, service.tokenizer, merger)
    events = generation.chunks(service, body, merger, shapes) if body.stream else None
    return await generation.answer(service, http, merger, shapes.whole, events)


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat body, resolved: what runs, and how each of its answers is read."""

    request: Request
    new_parser: Callable[[], AnswerParser]
    calls_finish: bool
    """An answer with tool calls ends with "tool_calls"; not so when the one function was named (OpenAI's rule)."""


def plan(body: ChatBody, request_id: str, service: TheService) -> ChatPlan:
    """Resolve a body; InvalidRequestError names what does not fit together."""
    tokenizer, template = service.tokenizer, service.response_template
    body.check_stream()
    tools = plan_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    grammar = _grammar(body, tools, template, tokenizer)
    if tools.mode == "auto" and template is None:
        raise InvalidRequestError(
            "tool_choice",
            "this model's tokenizer has no response_template to find tool calls by; use required or a name",
        )
    limit = body.completion_limit()
    words = prompts.bad_words(body.bad_words, tokenizer)
    params = body.sampling_params(
        service.sampling_defaults, limit, body.num_logprobs(), grammar=grammar, bad_words=words
    )
    max_tokens = prompts.most_tokens(body, service.max_model_len)
    rendered = prompts.render(body, body.messages, tools.shown, tokenizer, body.reasoning_effort, max_tokens)
    prompt = prompts.truncated(rendered, body, limit, service.max_model_len)
    needed = _template_for(tools, template) if grammar is None or tools.mode == "auto" else None
    if needed is not None:
        params = replace(params, skip_special_tokens=False)  # they may be what the template looks for
    new_parser = _parser_for(tools, needed, tokenizer.decode(prompt, skip_special_tokens=False))
    request = Request(request_id, prompt, params, time.monotonic(), body.priority or 0, body.cache_salt or "")
    return ChatPlan(request, new_parser, tools.mode != "named")


def _grammar(body: ChatBody, tools: ToolPlan, template: Template | None, tokenizer: Tokenizer) -> GrammarSpec | None:
    """What constrains the answer: a forced call, which leaves no content to constrain, or the request's own grammar."""
    own = body.grammar()
    if own is None or tools.grammar is not None or tools.mode == "none":
        return tools.grammar or own
    tags = call_tags(template) if template is not None else None
    if tags is None:
        raise InvalidRequestError(
            own.param, f"{own.param}: with tools and tool_choice auto only where the model writes calls as tagged JSON"
        )
    first, last = (tag if tag in tokenizer.hf.all_special_tokens else json.dumps(tag) for tag in tags)
    return calls_or_answer(tools, own, (first, last))


def _template_for(tools: ToolPlan, template: Template | None) -> Template | None:
    """The template as far as this request needs it: without tools there are no calls to be found."""
    if template is None or tools.mode == "auto":
        return template
    return without_fields(template, ["tool_calls"])


def _parser_for(tools: ToolPlan, template: Template | None, prompt: str) -> Callable[[], AnswerParser]:
    if tools.mode == "named":
        return lambda: NamedCall(tools.name)
    if tools.mode == "required":
        return ListOfCalls
    if template is None:
        return PlainText
    shown = [dict(tool) for tool in tools.shown]
    return lambda: TemplateAnswer(start_parser(template, prompt, shown), tools.is_parallel, call_syntax(template))


class ChatShapes:
    """The JSON of one request's answer, whole or in chunks."""

    def __init__(
        self, body: ChatBody, plan: ChatPlan, request_id: str, model: str, tokenizer: Tokenizer, merger: AnswerMerger
    ) -> None:
        self._body = body
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._merger = merger
        self._calls_finish = plan.calls_finish
        self._parsers = [plan.new_parser() for _ in range(plan.request.params.n)]
        self._with_calls: set[int] = set()
        """Choices that have made tool calls."""

    def whole(self, choices: Sequence[Completion]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        shaped = [self._whole_choice(c) for c in choices]
        usage = self._merger.usage.as_json()
        answer = {**self._head, "object": "chat.completion", "choices": shaped, "usage": usage} | self._prompt_ids()
        if self._body.prompt_logprobs is not None:
            request_id = self._merger.requests[0].request_id
            answer["prompt_logprobs"] = prompt_scores(self._merger.scores_of(request_id), self._tokenizer)
        return answer

    def _whole_choice(self, choice: Completion) -> dict[str, Any]:
        delta = self._read(choice.index, choice.text, True)
        message: dict[str, Any] = {"role": "assistant", "content": delta.content, "refusal": None}
        if delta.calls:
            message["content"] = delta.content or None
            message["tool_calls"] = [{k: v for k, v in c.as_json().items() if k != "index"} for c in delta.calls]
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        shaped = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": self._finish_reason(choice.index, choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            shaped["token_ids"] = choice.token_ids
        return shaped

    def _read(self, index: int, text: str, is_last: bool) -> Delta:
        delta = self._parsers[index].feed(text, is_last)
        if delta.calls:
            self._with_calls.add(index)
        if self._body.include_reasoning is False:
            delta.reasoning = ""
        return delta

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        if reason is FinishReason.STOP and self._calls_finish and index in self._with_calls:
            return "tool_calls"
        return reason

    def _prompt_ids(self) -> dict[str, Any]:
        ids = list(self._merger.requests[0].prompt_token_ids)
        return {"prompt_token_ids": ids} if self._body.return_token_ids else {}

    def first_chunks(self) -> list[dict[str, Any]]:
        """One chunk per choice that only names the role."""
        chunks = [
            self._chunk(i, {"role": "assistant", "content": ""}, None, None, None) for i in range(len(self._parsers))
        ]
        chunks[0] |= self._prompt_ids()
        return chunks

    def chunk(self, index: int, output: SampleOutput) -> dict[str, Any] | None:
        """One streamed chunk, or None when the output shows nothing yet."""
        read = self._read(index, output.text, output.finish_reason is not None)
        if not read and output.finish_reason is None and not output.logprobs and not self._body.return_token_ids:
            return None
        finish_reason = self._finish_reason(index, output.finish_reason)
        chunk = self._chunk(index, _as_json(read), self._logprobs(output.logprobs), finish_reason, output.stop_reason)
        if self._body.return_token_ids:
            chunk["choices"][0]["token_ids"] = list(output.token_ids)
        return chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.as_json()}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: Any, stop_reason: Any
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """OpenAI's chat shape: one object per token."""
        if not self._body.logprobs:
            return None
        return {"content": [{**self._token(p.token_id, p.logprob), "top_logprobs": self._top(p)} for p in logprobs]}

    def _top(self, logprob: TokenLogprob) -> list[dict[str, Any]]:
        return [self._token(token_id, value) for token_id, value in logprob.top]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token_id)
        shown = f"token_id:{token_id}" if self._body.return_tokens_as_token_ids else text
        return {"token": shown, "logprob": json_logprob(logprob), "bytes": self._tokenizer.token_bytes(token_id)}


def _as_json(delta: Delta) -> dict[str, Any]:
    shaped: dict[str, Any] = {}
    if delta.content:
        shaped["content"] = delta.content
    if delta.reasoning:
        shaped["reasoning_content"] = delta.reasoning
    if delta.calls:
        shaped["tool_calls"] = [call.as_json() for call in delta.calls]
    return shaped
