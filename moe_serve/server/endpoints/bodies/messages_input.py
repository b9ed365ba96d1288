"""Anthropic's messages as those of a chat template. Knows JSON; knows no tokenizer.

A user's turn may hold tool results beside text: each result becomes a message of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_serve.errors import InvalidRequestError, UnsupportedFieldError

ROLES = ("user", "assistant", "system")
BILLING = "x-anthropic-billing-header:"
"""Begins a system block that Claude Code writes for Anthropic's accounts. It differs in each request, so that no two
requests would share a prefix."""

Message = dict[str, Any]
Block = Mapping[str, Any]


def messages_of(given: Sequence[Block], system: str | Sequence[Block] | None) -> list[Message]:
    """The conversation, for a chat template. InvalidRequestError names `messages` or `system`, and the block."""
    turns = [turn for index, message in enumerate(given) for turn in _turn(message, f"messages[{index}]")]
    first = [] if system is None else [_joined(system, "system", "\n\n")]
    begun = next((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return [*_before_any_answer(first, turns[:begun]), *turns[begun:]]


def _before_any_answer(system: list[str], turns: Sequence[Message]) -> list[Message]:
    """The system's turns among them join `system`: chat templates take one system message, and first. Claude Code sends
    a second one behind the user's first turn."""
    texts = [*system, *(turn["content"] for turn in turns if turn["role"] == "system")]
    text = "\n\n".join(filter(None, texts))
    others = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": text}, *others] if text else others


def is_prefill(messages: Sequence[Message]) -> bool:
    """Whether the answer goes on with the last message, which is the assistant's own text."""
    last = messages[-1]
    return bool(last["role"] == "assistant" and last["content"] and "tool_calls" not in last)


def _turn(message: Block, where: str) -> list[Message]:
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequestError("messages", f"{where}.role must be one of {', '.join(ROLES)}")
    if extra := sorted(message.keys() - {"role", "content"}):
        raise InvalidRequestError("messages", f"{where}: unknown field {extra[0][:100]!r}")
    content = message.get("content")
    if role == "assistant":
        return [_assistant(content, where)]
    if role == "system":
        return [{"role": "system", "content": _joined(content, where)}]
    return list(_user(content, where))


def _user(content: Any, where: str) -> Iterator[Message]:
    """Tool results and texts in their order; texts that follow one another are one message."""
    texts: list[str] = []
    for place, block in _blocks(content, where):
        if block["type"] == "text":
            texts.append(_text(block, "text", place))
            continue
        if block["type"] != "tool_result":
            raise _unsupported(block, place)
        if texts:
            yield {"role": "user", "content": "\n".join(texts)}
            texts = []
        yield _result(block, place)
    if texts:
        yield {"role": "user", "content": "\n".join(texts)}


def _result(block: Block, place: str) -> Message:
    content = block.get("content")
    text = "" if content is None or content == [] else _joined(content, f"{place}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": _text(block, "tool_use_id", place), "content": text}


def _assistant(content: Any, where: str) -> Message:
    texts, thoughts, calls = [], [], []
    for place, block in _blocks(content, where):
        kind = block["type"]
        if kind == "text":
            texts.append(_text(block, "text", place))
        elif kind == "thinking":
            thoughts.append(_text(block, "thinking", place))
        elif kind == "tool_use":
            calls.append(_call(block, place))
        elif kind != "redacted_thinking":  # nothing here can read what another server sealed
            raise _unsupported(block, place)
    message: Message = {"role": "assistant", "content": "".join(texts) if texts else None}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Block, place: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise InvalidRequestError("messages", f"{place}.input must be an object")
    function = {"name": _text(block, "name", place), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _text(block, "id", place), "type": "function", "function": function}


def _joined(content: Any, where: str, between: str = "\n") -> str:
    """Content that is nothing but text."""
    texts = []
    for place, block in _blocks(content, where):
        if block["type"] != "text":
            raise _unsupported(block, place)
        text = _text(block, "text", place)
        if not text.startswith(BILLING):
            texts.append(text)
    return between.join(texts)


def _blocks(content: Any, where: str) -> Iterator[tuple[str, Block]]:
    """Each block with its place; a string is one block of text."""
    if isinstance(content, str):
        yield where, {"type": "text", "text": content}
        return
    if not isinstance(content, list) or not content:
        raise InvalidRequestError(_field(where), f"{where}: content must be a string or a list of blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise InvalidRequestError(_field(where), f"{where}.content[{index}] must be an object with a type")
        yield f"{where}.content[{index}]", block


def _text(block: Block, name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(_field(place), f"{place}.{name} must be a string")
    return value


def _unsupported(block: Block, place: str) -> UnsupportedFieldError:
    kind = block["type"][:100]
    return UnsupportedFieldError(_field(place), f"{place}: {kind!r} blocks are not supported here, only text and tools")


def _field(place: str) -> str:
    """The body's field that a place is in."""
    return "system" if place.startswith("system") else "messages"
