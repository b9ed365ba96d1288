"""POST /v1/messages: Anthropic's form of a chat completion. Plans, runs and parses as chats do.

Knows FastAPI, and the chat endpoint's plan; what an answer's blocks and events are is in message_blocks.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from moe_serve.errors import MoEServeError
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import Completion, SampleOutput
from moe_serve.server.endpoints import chat
from moe_serve.server.endpoints.answers import generation, sse
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger
from moe_serve.server.endpoints.answers.message_blocks import ContentBlocks, Event
from moe_serve.server.endpoints.bodies import unsupported_fields
from moe_serve.server.endpoints.bodies.common_fields import CommonFields
from moe_serve.server.endpoints.bodies.given import TheService, parsed, prepared
from moe_serve.server.endpoints.bodies.json_types import Int, JsonList
from moe_serve.server.endpoints.bodies.messages_fields import (
    EFFORTS,
    OUR_NAMES,
    OutputConfig,
    Thinking,
    Tool,
    ToolChoice,
    client_tools,
    ignored_tools,
)
from moe_serve.server.endpoints.bodies.messages_input import is_prefill, messages_of
from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.renamed_fields import errors_under
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal
from moe_serve.server.endpoints.chat import ChatBody, ChatPlan
from moe_serve.text.tokenizer import Tokenizer

router = APIRouter()

PING = {"type": "ping"}


class CountTokensBody(Body, CommonFields):
    """POST /v1/messages/count_tokens, and what it has in common with /v1/messages."""

    model: str | None = None
    """The served model's name or path. A name that begins with `claude` stands for it too: agents ask by such names."""
    messages: Annotated[JsonList[dict[str, Any]], Field(min_length=1)]
    """Turns of user and assistant: text, tool_use, tool_result and thinking blocks. Turns of system before the first
    answer are added to `system`. A last turn of the assistant is continued."""
    system: str | JsonList[dict[str, Any]] | None = None
    """Text, or text blocks."""
    tools: JsonList[Tool] | None = None
    """Tools with an input_schema; the chat template must show them. Those that Anthropic defines are left out, and the
    header X-Ignored-Tools of the answer names them."""
    tool_choice: ToolChoice | None = None
    """auto (needs a response template), any, tool with a name, or none; disable_parallel_tool_use."""
    thinking: Thinking | None = None
    """Tells the chat template whether to think, where it can be told; disabled also leaves thinking blocks out."""
    output_config: OutputConfig | None = None
    """effort, for chat templates that use one; format: JSON of a schema."""
    output_format: Any = None
    """The older name of output_config.format."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    cache_control: Any = None
    """Accepted and unused: every equal prefix is shared."""
    context_management: Any = None
    """Accepted and unused: the client's conversation stays as it is."""
    diagnostics: Any = None
    """Accepted and unused."""
    speed: Any = None
    """Accepted and unused: there is one speed."""
    inference_geo: Any = None
    """Accepted and unused."""
    user_profile_id: Any = None
    """Accepted and unused."""
    workspace_id: Any = None
    """Accepted and unused."""

    unsupported: ClassVar[Mapping[str, Refusal]] = unsupported_fields.MESSAGES
    error_schema: ClassVar[str] = "AnthropicError"

    def served_model(self) -> str | None:
        """The name to look up."""
        return None if (self.model or "").startswith("claude") else self.model

    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat completion that this asks for. InvalidRequestError names the field here."""
        messages = messages_of(self.messages, self.system)
        goes_on = is_prefill(messages)
        choice = self.tool_choice
        fields = {name: value for name in CommonFields.model_fields if (value := getattr(self, name)) is not None}
        return {
            **fields,
            "model": None,
            "messages": messages,
            "tools": [tool.as_chat() for tool in client_tools(self.tools)] or None,
            "tool_choice": choice.as_chat() if choice is not None else None,
            "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
            "chat_template_kwargs": self._template_variables(),
            "add_generation_prompt": not goes_on,
            "continue_final_message": goes_on,
            "response_format": self._response_format(),
        }

    def as_chat(self) -> ChatBody:
        """The chat completion that this asks for."""
        with errors_under(OUR_NAMES):
            return ChatBody.model_validate(self.chat_fields())

    def _template_variables(self) -> dict[str, Any]:
        thinking = self.thinking.template_variables() if self.thinking is not None else {}
        effort = self.output_config.effort if self.output_config is not None else None
        efforts = {"reasoning_effort": EFFORTS[effort]} if effort is not None else {}
        return {**thinking, **efforts, **(self.chat_template_kwargs or {})}

    def _response_format(self) -> dict[str, Any] | None:
        config = self.output_config
        if self.output_format is not None:
            with errors_under({"format": "output_format"}):
                config = OutputConfig.model_validate({"format": self.output_format})
        return config.format.as_chat() if config is not None and config.format is not None else None


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    max_tokens: Annotated[Int, Field(ge=1)]
    """Most tokens of the answer; less where the context ends before, which is no error."""
    stop_sequences: JsonList[str] | None = None
    """Up to 16 strings."""
    metadata: Any = None
    """Accepted and unused: a tag for abuse monitoring."""
    service_tier: Any = None
    """Accepted and unused: there is one tier."""

    def chat_fields(self) -> dict[str, Any]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stop = [*given, *(self.stop_sequences or [])]
        return {**super().chat_fields(), "stop": stop, "max_completion_tokens": self.max_tokens}


@router.post("/v1/messages")
async def create_message(
    body: Annotated[MessagesBody, Depends(parsed(MessagesBody))], service: TheService, http: HttpRequest
) -> Response:
    """Answer a conversation in the form of Anthropic's Messages API."""
    service.check_model(body.served_model())
    request_id = generation.request_id("msg_", body, http)
    with errors_under(OUR_NAMES):
        plan = await prepared(http, lambda: _within_context(chat.plan(body.as_chat(), request_id, service), service))
        merger = AnswerMerger([plan.request])
        shape = MessageShape(body, plan, service.model_name, service.tokenizer, merger)
        events = generation.named_events(service, http, merger, shape) if body.stream else None
        answer = await generation.answer(service, http, merger, shape.whole, events, shape.ping)
    generation.name_ignored_tools(answer, ignored_tools(body.tools))
    answer.headers["request-id"] = request_id  # Anthropic's name of it
    return answer


@router.post("/v1/messages/count_tokens")
async def count_message_tokens(
    body: Annotated[CountTokensBody, Depends(parsed(CountTokensBody))], service: TheService, http: HttpRequest
) -> dict[str, int]:
    """How many tokens the prompt of a conversation has."""
    service.check_model(body.served_model())
    with errors_under(OUR_NAMES):
        plan = await prepared(http, lambda: chat.plan(body.as_chat(), "count", service))
    return {"input_tokens": len(plan.request.prompt_token_ids)}


def _within_context(plan: ChatPlan, service: TheService) -> ChatPlan:
    """The plan, with max_tokens no more than the context has room for: agents ask for as many as other models have."""
    room = service.max_model_len - len(plan.request.prompt_token_ids)
    params = plan.request.params
    if params.max_tokens is None or not 0 < room < params.max_tokens:
        return plan
    return replace(plan, request=replace(plan.request, params=replace(params, max_tokens=room)))


class MessageShape:
    """The JSON of one message, whole or as events."""

    ping = sse.named_events([PING])

    def __init__(
        self, body: MessagesBody, plan: ChatPlan, model: str, tokenizer: Tokenizer, merger: AnswerMerger
    ) -> None:
        self._request = plan.request
        self._parser = plan.new_parser()
        self._model = model
        self._tokenizer = tokenizer
        self._merger = merger
        self._is_capped = plan.request.params.max_tokens != body.max_tokens
        thinking = body.thinking
        self._blocks = ContentBlocks(
            with_thinking=thinking is None or thinking.is_wanted,
            with_thoughts=thinking is None or thinking.display != "omitted",
        )

    def whole(self, choices: Sequence[Completion]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        (choice,) = choices
        for _ in self._read(choice.text, choice.finish_reason):
            pass
        ending = self._ending(choice.finish_reason, choice.stop_reason)
        return self._message(self._blocks.content) | ending | {"usage": self._usage()}

    def begin(self) -> Iterator[Event]:
        """Before the first output, or in the middle of a long prompt: its tokens are known."""
        tokens = {"input_tokens": len(self._request.prompt_token_ids)} if not self._merger.usage.prompt_tokens else {}
        message = self._message([])
        yield {"type": "message_start", "message": message | {"usage": message["usage"] | tokens}}
        yield PING

    def feed(self, output: SampleOutput) -> Iterator[Event]:
        """What a step's output shows, and with the last one how the message ended."""
        yield from self._read(output.text, output.finish_reason)
        if output.finish_reason is not None:
            ending = self._ending(output.finish_reason, output.stop_reason)
            yield {"type": "message_delta", "delta": ending, "usage": self._usage()}
            yield {"type": "message_stop"}

    def fail(self, error: MoEServeError, body: Mapping[str, Any]) -> Iterator[Event]:
        """The last event, when the engine failed on the request."""
        yield dict(body)

    def _read(self, text: str, finish_reason: FinishReason | None) -> Iterator[Event]:
        yield from self._blocks.feed(self._parser.feed(text, finish_reason is not None))
        if finish_reason is not None:
            yield from self._blocks.close()

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._request.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _ending(self, reason: FinishReason | None, stop: int | str | None) -> dict[str, Any]:
        """`stop`: the stop string or token that was met."""
        if reason is FinishReason.LENGTH:
            limit = "model_context_window_exceeded" if self._is_capped else "max_tokens"
            return {"stop_reason": limit, "stop_sequence": None}
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": "tool_use" if self._blocks.has_calls else "end_turn", "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Input tokens that a cached prefix did not cover, and those it did; both together are the prompt."""
        usage = self._merger.usage
        thinking = self._tokenizer.encode(self._blocks.thinking, add_special_tokens=False)
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": len(thinking)},
        }
