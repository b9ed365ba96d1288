"""What today's clients send without being told to: taken where it changes no answer, else refused by its true name."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.scripted_model import Model
from tests.server.test_responses import CLOCK, WEATHER

S = {"type": "function", "name": "s", "parameters": {"type": "object", "properties": {}}}
TAKEN: list[dict[str, Any]] = [
    {"client_metadata": {"a": "b"}},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"mode": "auto"}},
    {"text": {"verbosity": "medium"}},
    {"text": {"verbosity": None}},
    {"include": ["web_search_call.action.sources"]},
    {"include": ["reasoning.encrypted_content"]},
    {"stream_options": {"include_obfuscation": True}},
    {"tools": [{"type": "web_search"}, {"type": "local_shell"}]},
    {"reasoning": {"effort": "medium", "summary": "auto"}},
    {"store": False},
    {"store": True},
]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [S, {"type": "custom", "name": "x", "format": {"type": "xml"}}]}, "tools", "tools.1.format"),
    ({"tools": [S, {"name": "x"}]}, "tools", "tools.1.type"),
    ({"moderation": "x"}, "moderation", "nothing is moderated"),
    ({"text": {"verbosity": "high"}}, "text", "text.verbosity"),
    ({"input": None}, "input", "input: Input should be a valid string or a valid list"),
    ({"tool_choice": "any", "tools": [S]}, "tool_choice", "'none', 'auto' or 'required' or an object"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{", "call_id": "a"}]}, "input", "input[0]"),
]


@pytest.mark.parametrize("fields", TAKEN, ids=json.dumps)
def test_responses_take_what_changes_nothing(served: Any, fields: dict[str, Any]) -> None:
    answer = served.talk(("/v1/responses", {"input": "Hello!", "max_output_tokens": 8, **fields}))[0]
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("fields", "param", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_responses_refuse_the_rest_by_name(served: Any, fields: dict[str, Any], param: str, text: str) -> None:
    answer = served.talk(("/v1/responses", {"input": "Hello!", "max_output_tokens": 8, **fields}))[0]
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/completions", {"prompt": None}, "prompt", "prompt: Input should be a valid string or a valid list"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt", "prompt.1: Input should be a valid integer"),
        ("/v1/completions", {"prompt": "x", "stop": ["a", None]}, "stop", "stop.1: Input should be a valid string"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            "messages",
            "messages.0.content: Input should be a valid string or a valid list",
        ),
    ],
)
def test_an_error_names_the_field_and_what_it_takes(
    served: Any, path: str, body: Any, param: str, message: str
) -> None:
    error = served.talk((path, body))[0].json()["error"]
    assert (error["param"], error["message"]) == (param, message)


def test_allowed_tools_are_the_ones_that_may_be_called(hermes: Model) -> None:
    hermes.says("")
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    response = hermes.client.responses.create(
        model="tiny", input="x", tools=[WEATHER, CLOCK], tool_choice=choice, extra_body={"seed": 1}
    )
    assert {item.name for item in response.output if item.type == "function_call"} == {"clock"}
    choice["tools"][0]["name"] = "nothing"
    with pytest.raises(openai.BadRequestError, match="names 'nothing'"):
        hermes.client.responses.create(model="tiny", input="x", tools=[WEATHER, CLOCK], tool_choice=choice)


def test_a_tool_may_carry_a_note_for_another_providers_cache(hermes: Model) -> None:
    hermes.says("It rains.")
    tool = {"type": "function", "function": {"name": "f"}, "cache_control": {"type": "ephemeral"}}
    assert hermes.chat(tools=[tool]).message.content == "It rains."
