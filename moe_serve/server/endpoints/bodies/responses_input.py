"""Input items of the Responses API as the messages of a conversation. Knows JSON; knows no tokenizer.

A turn of the assistant comes as several items (reasoning, text, calls) and is one message to a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_serve.errors import InvalidRequestError, UnsupportedFieldError

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
"""OpenAI's roles, and those that chat templates know."""
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text")

Message = dict[str, Any]


def messages_of(given: str | Sequence[Mapping[str, Any]], instructions: str | None) -> list[Message]:
    """The conversation, for a chat template. InvalidRequestError names `input` and the item."""
    messages: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not given:
        raise InvalidRequestError("input", "input: must hold at least one item")
    for index, item in enumerate(given):
        _add(messages, item, index)
    return _one_system([_with_content(message) for message in messages])


def _one_system(messages: list[Message]) -> list[Message]:
    """Instructions and the developer's first messages together: chat templates take one system message, and first."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    texts = [message["content"] for message in messages[:count]]
    return [{"role": "system", "content": "\n\n".join(texts)}, *messages[count:]]


def _add(messages: list[Message], item: Mapping[str, Any], index: int) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(messages, item, index)
    elif kind == "function_call":
        call = {"name": _text(item, "name", index), "arguments": _arguments(item, index)}
        entry = {"id": _text(item, "call_id", index), "type": "function", "function": call}
        _assistant(messages).setdefault("tool_calls", []).append(entry)
    elif kind == "custom_tool_call":
        call = {"name": _text(item, "name", index), "arguments": json.dumps({"input": _text(item, "input", index)})}
        entry = {"id": _text(item, "call_id", index), "type": "function", "function": call}
        _assistant(messages).setdefault("tool_calls", []).append(entry)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        content = _content(item.get("output"), index)
        messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", index), "content": content})
    elif kind == "reasoning":
        text = _content(item.get("content") or [], index)
        if text:
            _assistant(messages, is_new=True)["reasoning_content"] = text
    else:
        raise UnsupportedFieldError("input", f"input[{index}]: items of type {kind!r} are not supported")


def _add_message(messages: list[Message], item: Mapping[str, Any], index: int) -> None:
    role = ROLES.get(str(item.get("role")))
    if role is None:
        raise InvalidRequestError("input", f"input[{index}].role must be one of {', '.join(ROLES)}")
    content = _content(item.get("content"), index)
    if role == "assistant":
        _assistant(messages, is_new="content" in _last_assistant(messages))["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _last_assistant(messages: list[Message]) -> Message:
    """The assistant's turn that is still going on, or an empty one."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else {}


def _assistant(messages: list[Message], is_new: bool = False) -> Message:
    """The turn to add to. A call after its results, or a second text, begins a new one."""
    if is_new or not _last_assistant(messages):
        messages.append({"role": "assistant"})
    return messages[-1]


def _with_content(message: Message) -> Message:
    """Templates want to see content, be it none."""
    return {**message, "content": message.get("content")}


def _content(given: Any, index: int) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise InvalidRequestError("input", f"input[{index}]: its content must be text or a list of parts")
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UnsupportedFieldError("input", f"input[{index}]: {kind!r} parts are not supported, only text")
        texts.append(part["text"])
    return "".join(texts)


def _arguments(item: Mapping[str, Any], index: int) -> str:
    text = _text(item, "arguments", index)
    try:
        json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequestError("input", f"input[{index}].arguments must be a string of JSON") from None
    return text


def _text(item: Mapping[str, Any], name: str, index: int) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError("input", f"input[{index}].{name} must be a string")
    return value
