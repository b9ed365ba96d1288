"""Roles and content of messages: one reading of a conversation, whatever endpoint it comes by."""

from __future__ import annotations

from typing import Any

import pytest

from moe_serve.demo import MODEL
from moe_serve.server.endpoints.bodies.chat_messages import Message
from moe_serve.server.endpoints.bodies.common_fields import TemplateFields
from moe_serve.server.endpoints.bodies.prompts import render
from moe_serve.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_path(str(MODEL))


def prompt(tokenizer: Tokenizer, *messages: dict[str, Any]) -> str:
    ids = render(TemplateFields(), [Message.model_validate(m) for m in messages], (), tokenizer)
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("role", ["foo", "User", "function", "x" * 5000])
def test_an_unknown_role_is_refused_by_its_place(served: Any, role: str) -> None:
    answer = served.talk((CHAT, {"messages": [USER, {"role": role, "content": "x"}]}))[0]
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert answer.json()["error"]["message"].startswith("messages[1].role:")
    assert len(answer.text) < 500


def test_a_role_that_the_template_names_is_its_own(demo: Tokenizer) -> None:
    own = Tokenizer.from_path(str(MODEL))
    own.hf.chat_template = (
        "{% for m in messages %}{% if m.role == 'observation' %}!{% endif %}{{ m.content }}{% endfor %}"
    )
    assert prompt(own, {"role": "observation", "content": "x"}) == "!x"


def test_developer_is_system_by_every_endpoint(make: Any) -> None:
    messages = [{"role": "developer", "content": "be short"}, USER]
    bodies = [
        (CHAT, {"messages": messages, "max_tokens": 1}),
        (CHAT, {"messages": [{**messages[0], "role": "system"}, USER], "max_tokens": 1}),
        ("/v1/responses", {"input": messages, "max_output_tokens": 1}),
        ("/v1/responses", {"input": "hi", "instructions": "be short", "max_output_tokens": 1}),
    ]
    usage = [answer.json()["usage"] for answer in make().talk(*bodies)]
    assert len({u.get("prompt_tokens", u.get("input_tokens")) for u in usage}) == 1


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
@pytest.mark.parametrize("message", [{}, {"content": None}])
def test_who_says_nothing_is_refused(served: Any, role: str, message: dict[str, Any]) -> None:
    answer = served.talk((CHAT, {"messages": [{"role": role, **message}]}))[0]
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"messages[0].content: a {role} message needs it"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_turn_that_only_calls_has_empty_content(content: dict[str, Any]) -> None:
    """Through a template that adds to the content of each message, and shows no calls."""
    demo = Tokenizer.from_path(str(MODEL))
    demo.hf.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '|' }}{% endfor %}"
    called = {"role": "assistant", "tool_calls": [CALL], **content}
    got = prompt(demo, USER, called, {"role": "tool", "tool_call_id": "a", "content": "5"})
    assert got == prompt(demo, USER, {"role": "assistant", "content": ""}, {"role": "tool", "content": "5"})
