"""Server-sent events: dictionaries out as `data:` lines. Knows no requests and no engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

DONE = b"data: [DONE]\n\n"
MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies must pass each event on at once."""


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def events(items: Iterable[dict[str, Any]]) -> bytes:
    """Several events in one write."""
    return b"".join(map(event, items))
