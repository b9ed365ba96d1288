"""Request fields that constrain the form of the answer, and the one GrammarSpec they come to.

Knows pydantic and GrammarSpec; compiles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.server.endpoints.bodies.json_types import Flag, JsonList

JsonSchema = dict[str, Any]
Choices = Annotated[JsonList[str], Field(min_length=1, max_length=10_000)]


class NamedSchema(BaseModel):
    """`json_schema` of a response format, as OpenAI writes it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: Flag | None = None
    """Every schema is followed strictly, whatever this says."""


class ResponseFormat(BaseModel):
    """`response_format`: free text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self) -> GrammarSpec | None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequestError("response_format", "response_format: json_schema goes with type json_schema")
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.schema_
        return schema_grammar(schema, "response_format")


class StructuredOutputs(BaseModel):
    """`structured_outputs`, vLLM's form: exactly one of the constraints."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    json_: JsonSchema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: Flag | None = None

    def specs(self) -> list[GrammarSpec]:
        given = _specs("structured_outputs", self.json_, self.regex, self.choice, self.grammar)
        if self.json_object:
            given.append(schema_grammar({"type": "object"}, "structured_outputs"))
        if len(given) != 1:
            raise InvalidRequestError("structured_outputs", "structured_outputs needs exactly one constraint")
        return given


class StructuredFields(BaseModel):
    """The fields that both completion endpoints have for this."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    response_format: ResponseFormat | None = None
    """Text, any JSON object, or JSON of a schema."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's constraints: json, regex, choice, grammar (Lark or GBNF) or json_object."""
    guided_json: JsonSchema | str | None = None
    """As structured_outputs.json."""
    guided_regex: str | None = None
    """As structured_outputs.regex."""
    guided_choice: Choices | None = None
    """As structured_outputs.choice."""
    guided_grammar: str | None = None
    """As structured_outputs.grammar."""

    def grammar(self) -> GrammarSpec | None:
        """The constraint, if there is one; InvalidRequestError when there are several."""
        given = [
            *_specs("guided_json", self.guided_json),
            *_specs("guided_regex", regex=self.guided_regex),
            *_specs("guided_choice", choice=self.guided_choice),
            *_specs("guided_grammar", grammar=self.guided_grammar),
        ]
        if self.structured_outputs is not None:
            given += self.structured_outputs.specs()
        if self.response_format is not None and (spec := self.response_format.grammar()) is not None:
            given.append(spec)
        if len(given) > 1:
            raise InvalidRequestError(given[1].param, f"{given[1].param} cannot be combined with {given[0].param}")
        return given[0] if given else None


def schema_grammar(schema: Mapping[str, Any], param: str) -> GrammarSpec:
    """JSON of a schema."""
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema), param)


def _loaded(schema: JsonSchema | str, param: str) -> JsonSchema:
    """A schema that may come as a string of JSON."""
    try:
        loaded = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(param, f"{param}: the schema is not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise InvalidRequestError(param, f"{param}: the schema must be an object")
    return loaded


def _specs(
    param: str,
    schema: JsonSchema | str | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> list[GrammarSpec]:
    given = []
    if schema is not None:
        given.append(schema_grammar(_loaded(schema, param), param))
    if regex is not None:
        given.append(GrammarSpec(GrammarKind.REGEX, regex, param))
    if choice is not None:
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)
        given.append(GrammarSpec(GrammarKind.LARK, f"start: {alternatives}", param))
    if grammar is not None:
        kind = GrammarKind.GBNF if "::=" in grammar else GrammarKind.LARK
        given.append(GrammarSpec(kind, grammar, param))
    return given
