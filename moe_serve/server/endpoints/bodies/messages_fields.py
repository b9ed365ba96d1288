"""Fields of Anthropic's Messages API that are objects, and what a chat completion calls them.

Knows pydantic; knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from moe_serve.errors import InvalidRequestError
from moe_serve.server.endpoints.bodies.json_types import Flag, Int
from moe_serve.server.endpoints.bodies.structured import JsonSchema
from moe_serve.server.endpoints.bodies.tools import Name

OUR_NAMES = MappingProxyType(
    {
        "prompt": "messages",
        "max_completion_tokens": "max_tokens",
        "stop": "stop_sequences",
        "response_format": "output_config",
        "parallel_tool_calls": "tool_choice",
    }
)
"""What an error about a chat body's field is about here."""
EFFORTS = MappingProxyType({"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"})
"""Anthropic's levels as chat templates know them."""


class ClientTool(BaseModel):
    """A tool that the client runs."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    input_schema: dict[str, Any]
    """JSON schema of the input."""
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: Flag | None = None
    """Forced calls follow the schema strictly, whatever this says."""
    cache_control: Any = None
    """Accepted and unused: every equal prefix is shared."""
    allowed_callers: Any = None
    """Accepted and unused: only the model calls."""
    defer_loading: Flag | None = None
    """Accepted and unused: every tool is shown."""
    eager_input_streaming: Flag | None = None
    """Accepted and unused."""
    input_examples: Any = None
    """Accepted and unused: chat templates do not show them."""

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


class OtherTool(BaseModel):
    """A tool that Anthropic defines or runs, such as web search: the model here does not get to see it."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_.-]+$")]
    """Such as web_search_20250305."""


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "ClientTool" if kind is None or kind == "custom" else "OtherTool"


Tool = Annotated[
    Annotated[ClientTool, Tag("ClientTool")] | Annotated[OtherTool, Tag("OtherTool")], Discriminator(_kind)
]


class ToolChoice(BaseModel):
    """`tool_choice`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """Of the tool to call, with type tool."""
    disable_parallel_tool_use: Flag | None = None
    """true: at most one call."""

    def as_chat(self) -> str | dict[str, Any]:
        """As chat completions write it."""
        if (self.type == "tool") != (self.name is not None):
            raise InvalidRequestError("tool_choice", "tool_choice: name goes with type tool")
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(BaseModel):
    """`thinking`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Annotated[Int, Field(ge=1)] | None = None
    """Accepted and unused: the model thinks as long as it does, within max_tokens."""
    display: Literal["summarized", "omitted"] | None = None
    """omitted: thinking blocks come without their text."""

    @property
    def is_wanted(self) -> bool:
        return self.type != "disabled"

    def template_variables(self) -> dict[str, bool]:
        """The names under which chat templates read whether to think."""
        return {"enable_thinking": self.is_wanted, "thinking": self.is_wanted}


class OutputFormat(BaseModel):
    """`output_config.format`: JSON of a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")

    def as_chat(self) -> dict[str, Any]:
        """As chat completions write it."""
        return {"type": "json_schema", "json_schema": {"name": "output", "schema": self.schema_}}


class OutputConfig(BaseModel):
    """`output_config`."""

    model_config = ConfigDict(extra="forbid")

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Given to the chat template as reasoning_effort; a template may leave it unused."""
    format: OutputFormat | None = None
    task_budget: Any = None
    """Accepted and unused."""


def client_tools(tools: Sequence[ClientTool | OtherTool] | None) -> list[ClientTool]:
    """Those that the model gets to see."""
    return [tool for tool in tools or () if isinstance(tool, ClientTool)]


def ignored_tools(tools: Sequence[ClientTool | OtherTool] | None) -> list[str]:
    """The types of those that it does not, each once."""
    return list(dict.fromkeys(tool.type for tool in tools or () if isinstance(tool, OtherTool)))
