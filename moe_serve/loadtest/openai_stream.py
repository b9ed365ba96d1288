"""Reads the streamed answers of any OpenAI-compatible server. Pure functions: no HTTP here.

An answer is a sequence of lines `data: {json}`, ended by `data: [DONE]`; other lines are comments.
"""

from __future__ import annotations

import json
from typing import Any

from moe_serve.errors import MoEServeError


class ServerReplyError(MoEServeError):
    """The server answered, but not with what was asked for."""


def parse_line(line: str) -> dict[str, Any] | None:
    """The event on a line of the stream; None where there is none. An error event raises."""
    if not line.startswith("data:"):
        return None
    payload = line.removeprefix("data:").strip()
    if payload == "[DONE]":
        return None
    event: dict[str, Any] = json.loads(payload)
    if "error" in event:
        raise ServerReplyError(error_message(event))
    return event


def text_of(event: dict[str, Any]) -> str | None:
    """New text in an event of either API: "" for a token without text, None for no token at all."""
    choices = event.get("choices") or []
    if not choices:
        return None
    if "text" in choices[0]:
        return str(choices[0]["text"])
    delta = choices[0].get("delta") or {}
    parts = [delta.get(key) for key in ("reasoning", "reasoning_content", "content")]
    return None if parts == [None] * 3 else "".join(part for part in parts if part)


def error_message(body: Any) -> str:
    """The message inside an error body, in any of the shapes servers use."""
    if isinstance(body, dict):
        inner = body.get("error", body.get("message", body.get("detail", body)))
        return error_message(inner) if inner is not body else json.dumps(body)
    return str(body)


def reply_error(status: int, text: str) -> ServerReplyError:
    """A reply with a status other than 200, as an error with the server's own message."""
    try:
        message = error_message(json.loads(text))
    except ValueError:
        message = text.strip()[:200]
    return ServerReplyError(f"the server answered {status}: {message}")
