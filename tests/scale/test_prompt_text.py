"""Bodies whose prompts begin alike give text that begins alike; what is no body gives none."""

from __future__ import annotations

import json

import pytest

from moe_serve.scale.prompt_text import prompt_text

SYSTEM = {"role": "system", "content": "You are terse."}


def text(**fields: object) -> str:
    return prompt_text(json.dumps(fields).encode())


def test_a_longer_conversation_begins_as_the_shorter_one() -> None:
    first = [SYSTEM, {"role": "user", "content": "Hello"}]
    longer = [*first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]
    assert text(messages=longer, stream=True).startswith(text(messages=first, max_tokens=5))


def test_tools_and_system_come_before_the_messages() -> None:
    same = [{"role": "user", "content": "Hello"}]
    with_tools = text(messages=same, tools=[{"name": "look"}])
    assert with_tools.index("look") < with_tools.index("Hello")
    assert text(system="A", messages=same).index("A") < text(system="A", messages=same).index("Hello")


def test_prompts_and_inputs_count() -> None:
    assert text(prompt="Once upon a time").endswith("Once upon a time")
    assert text(input="Once").endswith("Once")
    assert "[1, 2, 3]" in text(prompt=[[1, 2, 3]])


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"messages": 5}'])
def test_no_body_is_an_error(body: bytes) -> None:
    assert isinstance(prompt_text(body), str)
