"""The messages of a conversation, and how each becomes what chat templates expect. Knows no tokenizer."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from moe_serve.errors import InvalidRequestError, UnsupportedFieldError
from moe_serve.server.endpoints.bodies.json_types import JsonList

ROLES = ("system", "developer", "user", "assistant", "tool")
"""OpenAI's. Chat templates write `developer` as `system`, where they know it at all."""
NEED_CONTENT = ("system", "developer", "user", "tool")


class ContentPart(BaseModel):
    """One part of a message's content; only text is supported."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn. Further keys are passed to the chat template, which may use them."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    """system, developer, user, assistant, tool, or another that the chat template names."""
    content: str | JsonList[ContentPart] | None = None
    tool_calls: JsonList[dict[str, Any]] | None = None

    def as_template_input(self, index: int) -> dict[str, Any]:
        """The message as chat templates expect it: content as one string, arguments of tool calls as objects."""
        message = self.model_dump(exclude_unset=True)
        if self.content is None and self.role in NEED_CONTENT:
            raise InvalidRequestError("messages", f"messages[{index}].content: a {self.role} message needs it")
        message["role"] = "system" if self.role == "developer" else self.role
        message["content"] = self.content or ""  # templates add it to text, and None is no text
        if isinstance(self.content, list):
            other = next((p.type for p in self.content if p.type != "text" or p.text is None), None)
            if other is not None:
                raise UnsupportedFieldError("messages", f"messages[{index}].content: {other!r} parts are not supported")
            message["content"] = "".join(p.text or "" for p in self.content)
        if self.tool_calls:
            message["tool_calls"] = [_with_object_arguments(call, index) for call in self.tool_calls]
        return message


def _with_object_arguments(call: dict[str, Any], index: int) -> dict[str, Any]:
    """OpenAI writes a call's arguments as a string of JSON; templates want the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            "messages", f"messages[{index}].tool_calls: the arguments of a function must be a string of JSON"
        ) from None
    return {**call, "function": {**function, "arguments": arguments}}
