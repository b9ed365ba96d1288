"""A forced call that max_tokens cuts off: what is whole is a call, the rest is neither call nor content."""

from __future__ import annotations

import pytest

from moe_serve.server.endpoints.answers.answer_parsers import Delta, ListOfCalls

WHOLE = '[{"name": "f", "parameters": {"a": "p"}}, {"name": "g", "parameters": {"b": {"c": [1, 2]}}}]'
FIRST_END = WHOLE.index("}}") + 2


def read(text: str, size: int) -> list[Delta]:
    """Deltas of a text that comes in pieces of this many characters and ends there."""
    parser, pieces = ListOfCalls(), [text[i : i + size] for i in range(0, len(text), size)]
    return [*(parser.feed(piece, False) for piece in pieces), parser.feed("", True)]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("end", range(1, len(WHOLE) + 1, 3))
def test_no_syntax_of_calls_becomes_content(end: int, size: int) -> None:
    deltas = read(WHOLE[:end], size)
    assert "".join(delta.content for delta in deltas) == ""
    names = [call.name for delta in deltas for call in delta.calls]
    assert names == ["f", "g"][: (end >= FIRST_END) + (end >= len(WHOLE) - 1)]
