"""Responses that the server keeps, custom tools, and what Codex sends, through the real openai client."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moe_serve.config import ServerConfig
from moe_serve.errors import InvalidRequestError, ResponseNotFoundError
from moe_serve.server.endpoints.answers.response_store import ResponseStore
from moe_serve.server.endpoints.bodies.responses_input import messages_of
from moe_serve.server.transport.guard import guard
from tests.server.conftest import live_server
from tests.server.scripted_model import Model
from tests.server.test_responses import ask, streamed

PATCH: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
CUSTOM_CALL = '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "*** a\\nb"}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_the_beginning_of_the_next_one(hermes: Model, stream: bool) -> None:
    hermes.says("It rains.")
    first = streamed(hermes)[0] if stream else ask(hermes)
    assert first.store is True
    turns: list[Any] = [{"role": "user", "content": "The weather?"}, *first.output, {"role": "user", "content": "Why?"}]
    second = ask(hermes, input="Why?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens == ask(hermes, input=turns).usage.input_tokens
    third = ask(hermes, input="And then?", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens


def test_a_stored_response_is_read_and_deleted(hermes: Model) -> None:
    hermes.says("It rains.")
    given, client = ask(hermes, metadata={"k": "v"}), hermes.client
    kept = client.responses.retrieve(given.id)
    assert kept.output_text == "It rains."
    assert (kept.metadata, kept.usage) == ({"k": "v"}, given.usage)
    (item,) = client.responses.input_items.list(given.id).data
    assert item.content == "The weather?"  # type: ignore[union-attr]
    client.responses.delete(given.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="is stored here"):
            call(given.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(hermes, previous_response_id=given.id)
    assert caught.value.param == "previous_response_id"


def test_what_is_not_to_be_stored_is_not(hermes: Model) -> None:
    hermes.says("It rains.")
    given = ask(hermes, store=False)
    assert given.store is False
    with pytest.raises(openai.NotFoundError):
        hermes.client.responses.retrieve(given.id)


def test_one_key_does_not_read_what_another_has_asked(make: Any) -> None:
    app: Any = guard(make().app, ServerConfig(), frozenset({"a", "b"}))
    with live_server(app) as url:
        one, other = ({"Authorization": f"Bearer {key}"} for key in "ab")
        body = {"input": "x", "max_output_tokens": 2}
        kept = f"{url}/v1/responses/{httpx.post(f'{url}/v1/responses', json=body, headers=one).json()['id']}"
        assert httpx.get(kept, headers=one).status_code == 200
        assert httpx.get(kept, headers=other).status_code == 404


def test_the_oldest_make_room() -> None:
    store = ResponseStore(budget_bytes=300)
    for name in ("a", "b", "c"):
        store.keep("", {"id": name, "output": ["x" * 80]}, [{"content": "y"}])
    with pytest.raises(ResponseNotFoundError):
        store.response("", "a")
    assert store.conversation("", "c") == [{"content": "y"}, "x" * 80]
    store.keep("", {"id": "b", "output": []}, [])
    store.keep("", {"id": "d", "output": ["x" * 80]}, [])
    assert store.response("", "b") == {"id": "b", "output": []}
    store.keep("", {"id": "large", "output": ["x" * 400]}, [])
    with pytest.raises(InvalidRequestError, match="send the whole conversation"):
        store.conversation("", "large")
    assert store.response("", "d")


def test_without_a_budget_nothing_is_kept(make: Any) -> None:
    served = make(app_stored_responses_mib=0)
    body = {"input": "x", "max_output_tokens": 2, "request_id": "a"}
    assert [a.status_code for a in served.talk(("/v1/responses", body), ("/v1/responses/resp_a", None))] == [200, 404]


def test_a_custom_tools_input_is_text(hermes: Model) -> None:
    hermes.says(CUSTOM_CALL)
    whole, (response, events) = ask(hermes, tools=[PATCH]), streamed(hermes, tools=[PATCH])
    for found in (whole, response):
        (call,) = found.output
        assert (call.type, call.name, call.input, call.status) == (
            "custom_tool_call",
            "apply_patch",
            "*** a\nb",
            "completed",
        )
    kinds = [e.type for e in events if "custom_tool_call" in e.type]
    assert kinds == ["response.custom_tool_call_input.delta", "response.custom_tool_call_input.done"]
    result: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Success."}
    hermes.says("Done.")
    turns = [{"role": "user", "content": "Edit it."}, *whole.output, result]
    assert ask(hermes, input=turns, tools=[PATCH]).output_text == "Done."


def test_a_custom_tool_can_be_forced(hermes: Model) -> None:
    (call,) = ask(hermes, tools=[PATCH], tool_choice={"type": "custom", "name": "apply_patch"}).output
    assert call.type == "custom_tool_call"


def test_tools_that_openai_runs_are_left_out_and_named(hermes: Model) -> None:
    hermes.says("It rains.")
    tools: Any = [PATCH, {"type": "web_search"}, {"type": "web_search"}, {"type": "image_generation"}]
    answer = hermes.client.responses.with_raw_response.create(model="tiny", input="x", tools=tools)
    assert answer.headers["X-Ignored-Tools"] == "web_search, image_generation"


def test_an_ordinary_turn_of_codex(hermes: Model) -> None:
    hermes.says(CUSTOM_CALL)
    turn = json.loads((Path(__file__).parent / "agent_turns" / "codex.json").read_text())
    headers = {"originator": "codex_cli_rs", "session_id": "s", "Accept": "text/event-stream"}
    answer = httpx.post(f"{hermes.client.base_url}responses", json=turn, headers=headers)
    assert answer.status_code == 200, answer.text
    last = json.loads(answer.text.strip().split("\n\n")[-1].split("data: ")[1])
    assert last["type"] == "response.completed"
    assert [item["type"] for item in last["response"]["output"]] == ["custom_tool_call"]


def test_instructions_and_the_developers_first_messages_are_one_system_message() -> None:
    """Chat templates refuse a second one."""
    items = [{"role": "developer", "content": "b"}, {"role": "user", "content": "c"}]
    assert messages_of(items, "a") == [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/v1/images/generations", "/v1/files"])
def test_what_openai_has_and_this_server_has_not_says_so(served: Any, path: str) -> None:
    answer = served.talk((path, {"input": "x"}))[0]
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (404, 404, "invalid_request_error")
    assert path in error["message"]
    named = set(re.findall(r"/v1/\w+(?:/\w+)?", error["message"].partition(";")[2]))
    assert len(named) == 4
    assert named <= set(served.app.openapi()["paths"])
