"""Tools: what a request says about them, and the grammar that forces a call. Knows no tokenizer.

A forced call is written as JSON of a fixed form, whatever the model's own habit: the arguments object
alone for a named function, a list of {"name", "parameters"} objects for "required" (vLLM's convention).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_serve.errors import InvalidRequestError
from moe_serve.grammars.whitespace import JSON_WHITESPACE
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.server.endpoints.bodies.json_types import Flag, JsonList
from moe_serve.server.endpoints.bodies.structured import schema_grammar

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: Flag | None = None
    """Forced calls follow the schema strictly, whatever this says."""


class Tool(BaseModel):
    """A tool; only functions exist."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function
    cache_control: Any = Field(default=None, exclude=True)
    """Accepted and unused: every equal prefix is shared."""


class FunctionName(BaseModel):
    """The function that a tool_choice names."""

    model_config = ConfigDict(extra="forbid")

    name: Name


class NamedChoice(BaseModel):
    """`tool_choice` naming one function."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionName


class AllowedTools(BaseModel):
    """The functions out of `tools` that may be called."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["auto", "required"]
    tools: Annotated[JsonList[NamedChoice], Field(min_length=1)]


class AllowedChoice(BaseModel):
    """`tool_choice` naming several functions."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice
Mode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What one request wants of its tools."""

    mode: Mode
    shown: tuple[Mapping[str, Any], ...] = ()
    """What the chat template gets to see; nothing for mode "none"."""
    is_parallel: bool = True
    name: str = ""
    """The function of mode "named"."""
    grammar: GrammarSpec | None = None
    """Forces the call, for "required" and "named"."""
    functions: Mapping[str, Function] = field(default_factory=dict)
    """What may be called, for mode "auto"."""


def plan_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolPlan:
    """Resolve the three fields; InvalidRequestError names the one that does not fit."""
    if isinstance(choice, AllowedChoice):
        tools, choice = _allowed(tools or (), choice.allowed_tools), choice.allowed_tools.mode
    functions = {tool.function.name: tool.function for tool in tools or ()}
    if len(functions) < len(tools or ()):
        raise InvalidRequestError("tools", "tools: two functions have the same name")
    if not functions:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice", "tool_choice needs tools to choose from")
        return ToolPlan("none")
    if choice == "none":
        return ToolPlan("none")
    shown = tuple(tool.model_dump(exclude_none=True) for tool in tools or ())
    is_parallel = parallel is not False
    if isinstance(choice, NamedChoice):
        return _named(choice.function.name, functions, shown)
    if choice == "required":
        return ToolPlan("required", shown, is_parallel, grammar=_list_of_calls(functions, is_parallel))
    return ToolPlan("auto", shown, is_parallel, functions=functions)


def _allowed(tools: Sequence[Tool], allowed: AllowedTools) -> list[Tool]:
    names = {choice.function.name for choice in allowed.tools}
    if missing := names - {tool.function.name for tool in tools}:
        raise InvalidRequestError("tool_choice", f"tool_choice names {min(missing)!r}, which is not among tools")
    return [tool for tool in tools if tool.function.name in names]


def _named(name: str, functions: Mapping[str, Function], shown: tuple[Mapping[str, Any], ...]) -> ToolPlan:
    if name not in functions:
        raise InvalidRequestError("tool_choice", f"tool_choice names {name!r}, which is not among tools")
    return ToolPlan("named", shown, False, name, schema_grammar(_parameters(functions[name]), "tools"))


def _parameters(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _list_of_calls(functions: Mapping[str, Function], is_parallel: bool) -> GrammarSpec:
    """`[{"name": "f", "parameters": {...}}, ...]`."""
    more = ' (", " call)*' if is_parallel else ""
    lines = [f'start: "[" call{more} "]"', *_call_rules(functions, "parameters")]
    return GrammarSpec(GrammarKind.LARK, "\n".join(lines), "tools")


def calls_or_answer(plan: ToolPlan, answer: GrammarSpec, tags: tuple[str, str]) -> GrammarSpec:
    """For mode "auto": calls as the model writes them, or else an answer within a grammar. `tags`: Lark terms."""
    if answer.kind is GrammarKind.JSON_SCHEMA:
        rule = _json_rule(json.loads(answer.text))
    elif answer.kind is GrammarKind.REGEX:
        rule = "/" + answer.text.replace("/", r"\/") + "/"
    else:
        raise InvalidRequestError(
            answer.param, f"{answer.param}: beside tools an answer may follow a JSON schema or a regular expression"
        )
    more = r' ("\n" tagged)*' if plan.is_parallel else ""
    lines = [f"start: tagged{more} | answer", rf'tagged: {tags[0]} "\n" call "\n" {tags[1]}', f"answer: {rule}"]
    lines += _call_rules(plan.functions, "arguments")
    return GrammarSpec(GrammarKind.LARK, "\n".join(lines), answer.param)


def _call_rules(functions: Mapping[str, Function], key: str) -> list[str]:
    """Lark rules for `call`: {"name": ..., key: {...}}. Each schema stays a document of its own, so its $refs hold."""
    lines = ["call: " + " | ".join(f"f{i}" for i in range(len(functions)))]
    for i, (name, function) in enumerate(functions.items()):
        head = json.dumps(f'{{"name": "{name}", "{key}": ')
        lines += [f'f{i}: {head} p{i} "}}"', f"p{i}: {_json_rule(_parameters(function))}"]
    return lines


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}})
