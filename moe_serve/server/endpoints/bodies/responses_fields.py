"""Fields of a response's body that are objects, and what a chat completion calls them.

Knows pydantic; knows no engine.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moe_serve.server.endpoints.bodies.json_types import Flag, JsonList
from moe_serve.server.endpoints.bodies.structured import JsonSchema
from moe_serve.server.endpoints.bodies.tools import Function

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


Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""Values of `include`."""


class FunctionTool(Function):
    """A function that the model may call; other tools do not exist here."""

    type: Literal["function"]

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_unset=True)}


def _functions_only(value: Any) -> Any:
    """Tools that OpenAI's servers run, and those of another form, do not exist here."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"tools of type {kind[:100]!r} are not supported, only functions")
    return value


OnlyFunctions = Annotated[FunctionTool, BeforeValidator(_functions_only)]


class NamedFunction(BaseModel):
    """`tool_choice` naming one function."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    name: str

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(BaseModel):
    """`tool_choice` naming the functions out of `tools` that may be called."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[JsonList[NamedFunction], Field(min_length=1)]

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        return {"type": self.type, "allowed_tools": {"mode": self.mode, "tools": [t.as_chat() for t in self.tools]}}


class TextFormat(BaseModel):
    """`text.format`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: Flag | None = None
    """Every schema is followed strictly, whatever this says."""

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        if self.schema_ is None:
            return {"type": self.type}
        schema = {"name": self.name, "description": self.description, "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": schema}


class TextSettings(BaseModel):
    """`text`."""

    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None
    """Answers have the length that they have; ask for another in a message."""


class Reasoning(BaseModel):
    """`reasoning`."""

    model_config = ConfigDict(extra="forbid")

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Reasoning comes whole, whatever this says."""
