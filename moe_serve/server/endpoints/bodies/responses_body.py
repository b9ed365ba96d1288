"""The body of POST /v1/responses, and the chat body that asks for the same.

Nothing is kept between requests, so fields that refer to earlier answers are refused. Knows pydantic and ChatBody;
knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_serve.errors import InvalidRequestError
from moe_serve.server.endpoints.bodies import unsupported_fields
from moe_serve.server.endpoints.bodies.json_types import Flag, Int, Number
from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.responses_input import messages_of
from moe_serve.server.endpoints.bodies.sampling_body import ChatBody
from moe_serve.server.endpoints.bodies.structured import JsonSchema
from moe_serve.server.endpoints.bodies.tools import Function
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal

SAME_FIELDS = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "parallel_tool_calls",
    "priority",
    "request_id",
    "cache_salt",
    "stream",
    "chat_template_kwargs",
)
"""Fields that a chat body has under the same name and with the same meaning."""

OUR_NAMES = MappingProxyType(
    {
        "messages": "input",
        "prompt": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text",
        "reasoning_effort": "reasoning",
        "logprobs": "top_logprobs",
    }
)
"""What an error about a chat body's field is about here."""


class FunctionTool(Function):
    """A function that the model may call; other tools do not exist here."""

    type: Literal["function"]


class NamedFunction(BaseModel):
    """`tool_choice` naming one function."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    """`text.format`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: Flag | None = None
    """Every schema is followed strictly, whatever this says."""

    def as_response_format(self) -> dict[str, Any]:
        """As chat completions write it."""
        if self.schema_ is None:
            return {"type": self.type}
        schema = {"name": self.name, "description": self.description, "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": schema}


class TextSettings(BaseModel):
    """`text`."""

    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None


class Reasoning(BaseModel):
    """`reasoning`."""

    model_config = ConfigDict(extra="forbid")

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Reasoning comes whole, whatever this says."""


class ResponsesBody(Body):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]
    """Text, or messages, function_call, function_call_output and reasoning items. Text content only."""
    instructions: str | None = None
    """A system message before the input."""
    model: str | None = None
    """The served model's name or path; may be left out."""
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    """Default: to the end of the context."""
    stream: Flag | None = None
    """Server-sent events with names; the last is response.completed, .incomplete or .failed."""
    tools: list[FunctionTool] | None = None
    """Functions; the chat template must show them."""
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    """none, auto (needs a response template), required, or a function by name."""
    parallel_tool_calls: Flag | None = None
    """false: at most one call."""
    text: TextSettings | None = None
    """format: text, json_object or json_schema."""
    reasoning: Reasoning | None = None
    """effort is given to the chat template, which must use it; summary is accepted and unused."""
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """message.output_text.logprobs; reasoning.encrypted_content is accepted and unused: reasoning comes as text."""
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    """0 to 20 alternatives; needs message.output_text.logprobs in include."""
    temperature: Number | None = None
    """0 is greedy. Default: the checkpoint's, else 1."""
    top_p: Number | None = None
    """Above 0, at most 1."""
    top_k: Int | None = None
    """As in a chat completion, like the fields to cache_salt."""
    min_p: Number | None = None
    """0 to 1."""
    presence_penalty: Number | None = None
    """-2 to 2."""
    frequency_penalty: Number | None = None
    """-2 to 2."""
    repetition_penalty: Number | None = None
    """Above 0."""
    seed: Int | None = None
    """Same seed, same request: same tokens."""
    stop: str | list[str] | None = None
    """Up to 16 strings."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    priority: Int | None = None
    """Lower goes first."""
    request_id: str | None = None
    """Printable ASCII."""
    cache_salt: str | None = None
    """Share cached prefixes only with requests of the same salt."""
    metadata: dict[str, str] | None = None
    """Comes back in the answer."""
    user: str | None = None
    """Accepted and unused, as OpenAI documents it: an end-user tag for abuse monitoring."""
    safety_identifier: str | None = None
    """Accepted and unused, as user."""
    prompt_cache_key: str | None = None
    """Accepted and unused: every equal prefix is shared."""

    unsupported: ClassVar[Mapping[str, Refusal]] = unsupported_fields.RESPONSES

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def as_chat(self) -> ChatBody:
        """The chat completion that this asks for. InvalidRequestError names the field here."""
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise InvalidRequestError("top_logprobs", "top_logprobs needs message.output_text.logprobs in include")
        fields = {name: value for name in SAME_FIELDS if (value := getattr(self, name)) is not None}
        fields |= {
            "messages": messages_of(self.input, self.instructions),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "tools": [_chat_tool(tool) for tool in self.tools or ()] or None,
            "tool_choice": _chat_choice(self.tool_choice),
        }
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.as_response_format()
        with our_names():
            return ChatBody.model_validate(fields)


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_unset=True)}


def _chat_choice(choice: str | NamedFunction | None) -> Any:
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


@contextmanager
def our_names() -> Iterator[None]:
    """Have errors about a chat body name the field of this one."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = OUR_NAMES.get(str(problem["loc"][0]), str(problem["loc"][0]))
        raise InvalidRequestError(field, f"{field}: {problem['msg']}") from None
    except InvalidRequestError as error:
        error.param = OUR_NAMES.get(error.param, error.param)
        raise
