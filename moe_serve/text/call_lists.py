"""Calls that a model writes as one text: a list of Python calls, or JSON objects. Beside transformers' own readers of
parts of an answer, under names that response templates give.

ValueError where a text is none; it is content then. Knows texts; knows no tags and no models.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_parsing.content_parsers import CONTENT_PARSERS

from moe_serve.text.answer_format import JSON_CALLS, PYTHON_CALLS

JSON_WORDS = {"true": True, "false": False, "null": None}
"""What models write for Python's own words."""
BETWEEN = " \t\r\n;,"
"""JSON objects may stand one after the other."""

Calls = list[dict[str, Any]]
"""{"name", "arguments"} of each."""


def register() -> None:
    """Make both readers known to transformers' response templates. Idempotent."""
    CONTENT_PARSERS.setdefault(PYTHON_CALLS, python_calls)
    CONTENT_PARSERS.setdefault(JSON_CALLS, json_calls)


def python_calls(text: str, args: Mapping[str, Any]) -> Calls:
    """Of `[f(a=1, b="x"), g()]`, which is read and never run."""
    try:
        tree = ast.parse(_before_tag(text), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no list of calls: {error}") from error
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list of calls")
    return [_python_call(item) for item in tree.elts]


def _python_call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("no call with named arguments")
    return {"name": ast.unparse(node.func), "arguments": {str(k.arg): _value(k.value) for k in node.keywords}}


def _value(node: ast.expr) -> Any:
    """A literal's value; in it, JSON's words count too."""
    if isinstance(node, ast.Name) and node.id in JSON_WORDS:
        return JSON_WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(k): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    return ast.literal_eval(node)


def json_calls(text: str, args: Mapping[str, Any]) -> Calls:
    """Of `{"name": "f", "parameters": {...}}`, of several one after the other, or of a list of them."""
    rest, decoder, found = _before_tag(text), json.JSONDecoder(), []
    while rest := rest.lstrip(BETWEEN):
        value, end = decoder.raw_decode(rest)
        found += value if isinstance(value, list) else [value]
        rest = rest[end:]
    return [_json_call(item) for item in found]


def _json_call(item: Any) -> dict[str, Any]:
    fields = item.get("function") if isinstance(item, Mapping) else None
    given = fields if isinstance(fields, Mapping) else item
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError("a call has a name")
    arguments = given.get("parameters", given.get("arguments"))
    if not isinstance(arguments, Mapping):
        raise ValueError("a call has parameters or arguments")
    return {"name": given["name"], "arguments": dict(arguments)}


def _before_tag(text: str) -> str:
    """Without the tag that may end a list."""
    return text.strip().removesuffix("<|python_end|>").strip()
