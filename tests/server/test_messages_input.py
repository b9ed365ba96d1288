"""What /v1/messages takes from agents, and what it refuses by name, through the real anthropic client."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from moe_serve.server.endpoints.bodies.messages_input import messages_of
from tests.server.scripted_model import Model
from tests.server.test_messages import ASK, WEATHER, ask, refused, url_of
from tests.server.test_tools_and_grammars import CALL

SEARCH: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]: 'image'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}]}]},
        "messages[0].content[0].content.content[0]: 'image'",
    ),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "unknown field 'nam'"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]}, "input must be"),
    ({"messages": []}, "messages"),
    ({"system": [IMAGE]}, "system.content[0]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"extra_body": {"temperature": -1}}, "temperature"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [WEATHER, WEATHER]}, "same name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"extra_body": {"n": 2}}, "unknown field 'n'"),
    ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "mcp_servers is not supported"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "prompt is too long"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_by_its_name(claude: anthropic.Anthropic, stream: bool) -> None:
    for body, message in REFUSED:
        assert message in refused(functools.partial(ask, claude, stream=stream, **body)), body


def test_tools_that_the_model_cannot_see_are_refused(bare: Model) -> None:
    url = str(bare.client.base_url).removesuffix("/v1/")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        assert "does not show tools" in refused(lambda: ask(client, tools=[WEATHER], tool_choice={"type": "any"}))


def test_tools_that_anthropic_runs_are_left_out_and_named(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says("It rains.")
    with_search, without = ([WEATHER, SEARCH], [WEATHER])
    answer = claude.messages.with_raw_response.create(
        model="tiny", max_tokens=20, messages=ASK, tools=with_search, extra_body={"seed": 1}
    )
    assert answer.headers["X-Ignored-Tools"] == "web_search_20250305"
    count = functools.partial(claude.messages.count_tokens, model="tiny", messages=ASK)
    assert count(tools=with_search).input_tokens == count(tools=without).input_tokens


def test_an_ordinary_turn_of_a_coding_agent(hermes: Model, claude: anthropic.Anthropic) -> None:
    """The fields and blocks that Claude Code sends by itself."""
    hermes.says(CALL)
    cached = {"cache_control": {"type": "ephemeral"}}
    turn = json.loads((Path(__file__).parent / "agent_turns" / "claude_code.json").read_text())
    turn["tools"] += [{**WEATHER, **cached}]
    answer = httpx.post(
        f"{url_of(claude)}/v1/messages?beta=true",
        json=turn,
        headers={
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "context-management-2025-06-27",
            "x-api-key": "k",
        },
    )
    assert answer.status_code == 200, answer.text
    assert "event: message_stop" in answer.text
    assert '"name":"weather"' in answer.text
    counted = {k: v for k, v in turn.items() if k not in ("max_tokens", "stream", "metadata")}
    answer = httpx.post(f"{url_of(claude)}/v1/messages/count_tokens?beta=true", json=counted)
    assert answer.status_code == 200, answer.text


def test_the_line_for_anthropics_accounts_is_left_out() -> None:
    """It differs in each request, so that no two would share a prefix."""
    system = [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "Be short."}]
    assert messages_of(ASK, system) == messages_of(ASK, "Be short.")


def test_results_and_texts_of_one_turn_keep_their_order() -> None:
    blocks: list[dict[str, Any]] = [
        {"type": "tool_result", "tool_use_id": "1", "content": "x"},
        {"type": "tool_result", "tool_use_id": "2", "is_error": True, "content": [{"type": "text", "text": "y"}]},
        {"type": "tool_result", "tool_use_id": "3"},
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]
    calls = [{"type": "tool_use", "id": "1", "name": "f", "input": {"k": "ü"}}]
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    sealed = {"type": "redacted_thinking", "data": "x"}
    turn = [thought, sealed, {"type": "text", "text": "Wait."}, *calls]
    assert messages_of([{"role": "assistant", "content": turn}, {"role": "user", "content": blocks}], None) == [
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"k": "ü"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "Error: y"},
        {"role": "tool", "tool_call_id": "3", "content": ""},
        {"role": "user", "content": "a\nb"},
    ]
