"""The text of a request's body that decides which cached prefix fits. Knows the bodies of the HTTP API, roughly:
a wrong guess costs speed alone."""

from __future__ import annotations

import json
from typing import Any

FIRST = ("model", "tools", "system", "instructions")
"""Fields that a chat template puts before the conversation."""
CONVERSATIONS = ("messages", "input", "prompt")


def prompt_text(body: bytes) -> str:
    """Text that begins alike where prompts begin alike; empty if the body is no JSON object."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(fields, dict):
        return ""
    parts = [_text(fields[name]) for name in (*FIRST, *CONVERSATIONS) if name in fields]
    return "\x00".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\x00".join(json.dumps(item, ensure_ascii=False, sort_keys=True) for item in value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
