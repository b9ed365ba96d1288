"""JSON of a large answer, piece by piece: one call for all of it would keep the interpreter from every other thread.

orjson writes some 300 MB/s and lets nothing else run meanwhile; 64 answers with log-probabilities are 24 MB. Knows
JSON; knows no answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

MOST_ITEMS = 256
"""Of a list in one piece: 0.1 MB where each is a token with 20 alternatives."""
MOST_DEPTH = 5
"""As deep as answers nest lists of tokens: choices, choice, logprobs, content."""


def dumped(value: Any) -> bytes:
    """What orjson makes of the whole value."""
    return b"".join(_pieces(value, MOST_DEPTH))


def _pieces(value: Any, depth: int) -> Iterator[bytes]:
    if depth and isinstance(value, dict):
        yield from _joined(b"{}", ((orjson.dumps(key) + b":", item) for key, item in value.items()), depth)
    elif isinstance(value, list) and len(value) > MOST_ITEMS:
        parts = (orjson.dumps(value[i : i + MOST_ITEMS])[1:-1] for i in range(0, len(value), MOST_ITEMS))
        yield b"[" + b",".join(parts) + b"]"
    elif depth and isinstance(value, list) and value and isinstance(value[0], dict):
        yield from _joined(b"[]", ((b"", item) for item in value), depth)
    else:
        yield orjson.dumps(value)


def _joined(brackets: bytes, items: Iterator[tuple[bytes, Any]], depth: int) -> Iterator[bytes]:
    before = brackets[:1]
    for head, item in items:
        yield before + head
        yield from _pieces(item, depth - 1)
        before = b","
    yield brackets[1:] if before == b"," else brackets
