"""Fields of a response's body that are objects, and what a chat completion calls them.

Knows pydantic; knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from moe_serve.server.endpoints.bodies.json_types import Flag, JsonList
from moe_serve.server.endpoints.bodies.structured import JsonSchema
from moe_serve.server.endpoints.bodies.tools import Function, Name

OUR_NAMES = MappingProxyType(
    {
        "messages": "input",
        "prompt": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text",
        "logprobs": "top_logprobs",
    }
)
"""What an error about a chat body's field is about here."""

CUSTOM_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""Of the function that stands for a custom tool."""
NOT_SHOWN = {"type", "defer_loading", "output_schema"}

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
    """A function that the model may call."""

    type: Literal["function"]
    defer_loading: Flag | None = None
    """Accepted and unused: every tool is shown."""
    output_schema: Any = None
    """Accepted and unused: chat templates do not show it."""

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        return {"type": "function", "function": self.model_dump(exclude=NOT_SHOWN, exclude_unset=True)}


class CustomFormat(BaseModel):
    """`format` of a custom tool."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(BaseModel):
    """A tool whose input is free text. The model sees a function with one string; its text is the input."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: CustomFormat | None = None
    """A grammar is shown to the model, which is not held to it."""
    defer_loading: Flag | None = None
    """Accepted and unused: every tool is shown."""

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        told = self.description or ""
        if self.format is not None and self.format.definition is not None:
            told += f"\n\nThe input follows this {self.format.syntax or 'lark'} grammar:\n{self.format.definition}"
        function = {"name": self.name, "description": told.strip() or None, "parameters": CUSTOM_PARAMETERS}
        return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


class OtherTool(BaseModel):
    """A tool that OpenAI's servers run, such as web search: the model here does not get to see it."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_.-]+$")]


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else "function"
    return {"function": "FunctionTool", "custom": "CustomTool"}.get(str(kind), "OtherTool")


Tool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")]
    | Annotated[CustomTool, Tag("CustomTool")]
    | Annotated[OtherTool, Tag("OtherTool")],
    Discriminator(_kind),
]


def seen_tools(tools: Sequence[FunctionTool | CustomTool | OtherTool] | None) -> list[FunctionTool | CustomTool]:
    """Those that the model gets to see."""
    return [tool for tool in tools or () if not isinstance(tool, OtherTool)]


def ignored_tools(tools: Sequence[FunctionTool | CustomTool | OtherTool] | None) -> list[str]:
    """The types of those that it does not, each once."""
    return list(dict.fromkeys(tool.type for tool in tools or () if isinstance(tool, OtherTool)))


class NamedFunction(BaseModel):
    """`tool_choice` naming one function or custom tool."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function", "custom"]
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
