"""POST /v1/messages through the real anthropic client, against the real server, engine and sampler."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest

from moe_serve.cli.flags import default_model
from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.engine.engine import Engine
from moe_serve.server.app import create_app
from moe_serve.server.transport.guard import guard
from tests.fuzz.harness import served
from tests.server.scripted_model import Model
from tests.server.test_tools_and_grammars import CALL, PARAMETERS

ASK: Any = [{"role": "user", "content": "The weather?"}]
WEATHER: Any = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}
CLOCK: Any = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
THOUGHT = "<think>\nHm, rain.\n</think>It rains."


def url_of(client: anthropic.Anthropic) -> str:
    return str(client.base_url).rstrip("/")


def ask(client: anthropic.Anthropic, **body: Any) -> Any:
    extra = {"seed": 1, **body.pop("extra_body", {})}
    return client.messages.create(**({"model": "tiny", "max_tokens": 200, "messages": ASK} | body), extra_body=extra)


def streamed(client: anthropic.Anthropic, **body: Any) -> tuple[Any, list[Any]]:
    """(the message put together from the events by the client, the server's events)."""
    body = {"model": "tiny", "max_tokens": 200, "messages": ASK, "extra_body": {"seed": 1}} | body
    with client.messages.create(**body, stream=True) as raw:
        events = list(raw)
    with client.messages.stream(**body) as stream:
        return stream.get_final_message(), events


def shown(message: Any) -> list[dict[str, Any]]:
    """Blocks without what differs between two runs."""
    return [{k: v for k, v in b.model_dump().items() if k != "id" and v is not None} for b in message.content]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(anthropic.BadRequestError) as caught:
        call()
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    return str(body["error"]["message"])


def test_text_whole_and_streamed(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says("It rains.")
    whole = ask(claude, system="Be short.")
    assert [b.text for b in whole.content] == ["It rains."]
    assert (whole.role, whole.model, whole.stop_reason, whole.stop_sequence) == ("assistant", "tiny", "end_turn", None)
    assert whole.id.startswith("msg_")
    message, events = streamed(claude, system="Be short.")
    assert shown(message) == shown(whole)
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"] or kinds[:2] == [
        "message_start",
        "content_block_start",
    ]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_delta") > 1


def test_the_bytes_of_a_stream_are_named_events(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says("It rains.")
    body = {"max_tokens": 20, "messages": ASK, "stream": True}
    text = httpx.post(f"{url_of(claude)}/v1/messages", json=body).text
    events = [event.split("\n") for event in text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert all(
        json.loads(data.removeprefix("data: "))["type"] == name for name, (_, data) in zip(names, events, strict=True)
    )


def test_usage_tells_cached_tokens_apart(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says("It rains.")
    system = "Be short. " * 30
    first, second = (ask(claude, system=system).usage for _ in range(2))
    assert first.cache_read_input_tokens == 0
    assert second.cache_read_input_tokens > 0
    assert second.input_tokens + second.cache_read_input_tokens == first.input_tokens
    assert claude.messages.count_tokens(model="tiny", system=system, messages=ASK).input_tokens == first.input_tokens


def test_what_is_cut_off_says_by_what(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says("It rains. It pours. " * 9)
    for message in (ask(claude, max_tokens=3), streamed(claude, max_tokens=3)[0]):
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)


def test_more_than_the_context_has_room_for_ends_with_the_context(hermes: Model, claude: anthropic.Anthropic) -> None:
    """Agents ask for as many tokens as Anthropic's models have; the context here is 1024."""
    hermes.says("It rains. It pours. " * 9)
    long: Any = [{"role": "user", "content": "x" * 970}]
    length = claude.messages.count_tokens(model="tiny", messages=long).input_tokens
    assert 960 < length < 1024
    for message in (ask(claude, messages=long, max_tokens=5000), streamed(claude, messages=long, max_tokens=5000)[0]):
        assert message.stop_reason == "model_context_window_exceeded"
        assert message.usage.output_tokens == 1024 - length


def test_a_stop_sequence_is_named(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says("It rains. It pours.")
    for message in (ask(claude, stop_sequences=["pours"]), streamed(claude, stop_sequences=["pours"])[0]):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "pours")
        assert message.content[0].text == "It rains. It "


def test_calls_and_their_results(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says(f"Let me see.\n{CALL}")
    whole, (message, events) = ask(claude, tools=[WEATHER]), streamed(claude, tools=[WEATHER])
    for found in (whole, message):
        text, call = found.content
        assert (text.text.strip(), call.type, call.name) == ("Let me see.", "tool_use", "weather")
        assert call.input == {"city": "Oslo", "days": 2}
        assert call.id.startswith("toolu_")
        assert found.stop_reason == "tool_use"
    deltas = [
        e.delta.partial_json for e in events if getattr(getattr(e, "delta", None), "type", "") == "input_json_delta"
    ]
    assert json.loads("".join(deltas)) == {"city": "Oslo", "days": 2}
    hermes.says("It rains in Oslo.")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    turns = [*ASK, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert ask(claude, messages=turns, tools=[WEATHER]).content[0].text == "It rains in Oslo."


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=json.dumps)
def test_forced_calls(claude: anthropic.Anthropic, choice: Any) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    whole = ask(claude, tools=[WEATHER], tool_choice=choice)
    assert shown(whole) == shown(streamed(claude, tools=[WEATHER], tool_choice=choice)[0])
    (call,) = whole.content
    jsonschema.validate(call.input, PARAMETERS)
    assert whole.stop_reason == "tool_use"


def test_a_call_that_is_cut_off_is_none(hermes: Model, claude: anthropic.Anthropic) -> None:
    message = ask(claude, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"}, max_tokens=2)
    assert (message.content, message.stop_reason) == ([], "max_tokens")


def test_without_tools_to_choose_there_are_no_calls(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says(f"Let me see.\n{CALL}")
    message = ask(claude, tools=[WEATHER], tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason == "end_turn"


def test_thinking_is_a_block_of_its_own_and_may_be_sent_back(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says(THOUGHT)
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    message, events = streamed(claude, thinking=thinking)
    for found in (ask(claude, thinking=thinking), message):
        thought, text = found.content
        assert (thought.type, thought.thinking.strip(), text.text.strip()) == ("thinking", "Hm, rain.", "It rains.")
        assert thought.signature
        assert 0 < found.usage.output_tokens_details.thinking_tokens < found.usage.output_tokens
    kinds = [e.delta.type for e in events if e.type == "content_block_delta"]
    order = list(dict.fromkeys(kinds))
    assert order == ["thinking_delta", "signature_delta", "text_delta"]
    turns = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": "Why?"}]
    assert ask(claude, messages=turns).stop_reason == "end_turn"


def test_thinking_can_be_left_out_or_without_its_text(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says(THOUGHT)
    off: Any = {"type": "disabled"}
    for message in (ask(claude, thinking=off), streamed(claude, thinking=off)[0]):
        assert [block.type for block in message.content] == ["text"]
    hidden: Any = {"type": "adaptive", "display": "omitted"}
    for message in (ask(claude, thinking=hidden), streamed(claude, thinking=hidden)[0]):
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[0].thinking == ""


def test_the_template_is_told_whether_to_think_and_how_hard(hermes: Model, claude: anthropic.Anthropic) -> None:
    """The scripted template shows an effort."""
    count = functools.partial(claude.messages.count_tokens, model="tiny", messages=ASK)
    low, high = count(output_config={"effort": "low"}), count(output_config={"effort": "xhigh"})
    assert low.input_tokens > count().input_tokens
    assert high.input_tokens > count().input_tokens


def test_output_of_a_schema(hermes: Model, claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}
    message = ask(claude, output_config={"format": {"type": "json_schema", "schema": schema}})
    jsonschema.validate(json.loads(message.content[0].text), schema)


def test_the_assistants_last_turn_is_continued(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says(" rains.")
    turns = [*ASK, {"role": "assistant", "content": "It"}]
    assert ask(claude, messages=turns).content[0].text == " rains."
    opened = claude.messages.count_tokens(model="tiny", messages=ASK).input_tokens
    assert claude.messages.count_tokens(model="tiny", messages=turns).input_tokens > opened


def test_names_of_anthropics_models_stand_for_the_served_one(hermes: Model, claude: anthropic.Anthropic) -> None:
    hermes.says("It rains.")
    assert ask(claude, model="claude-haiku-4-5").model == "tiny"
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(claude, model="other")
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_a_failure_in_mid_stream_is_the_last_event(make: Any) -> None:
    served = make()
    served.fail_after_a_step()
    response = served.talk(("/v1/messages", {"messages": ASK, "max_tokens": 20, "stream": True}))[0]
    events = [json.loads(e.split("data: ")[1]) for e in response.text.strip().split("\n\n")]
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "error"]
    assert events[-1]["error"]["type"] == "api_error"


@pytest.mark.parametrize("header", [{"x-api-key": "k"}, {"Authorization": "Bearer k"}], ids=str)
def test_either_header_carries_the_key(make: Any, header: dict[str, str]) -> None:
    app = guard(make().app, ServerConfig(), frozenset({"k"}))
    with served(app) as url:  # type: ignore[arg-type]
        body = {"messages": ASK, "max_tokens": 2}
        assert httpx.post(f"{url}/v1/messages", json=body, headers=header).status_code == 200
        answer = httpx.post(f"{url}/v1/messages", json=body, headers={"x-api-key": "other"})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert "x-api-key" in answer.json()["error"]["message"]


def test_wrong_methods_and_bodies_keep_the_shape(served: Any) -> None:
    for answer in served.talk(("/v1/messages", b"{"), ("/v1/messages/batches", {})):
        assert answer.json()["type"] == "error"


def test_the_demo_model_answers() -> None:
    """Weights, template and tokenizer that are real."""
    settings = {"model": default_model(), "max_model_len": 512, "num_kv_pages": 64, "num_threads": 1, "device": "cpu"}
    engine = Engine.from_config(EngineConfig.from_dict(settings))
    body: dict[str, Any] = {"max_tokens": 12, "system": "Be short.", "messages": ASK, "extra_body": {"temperature": 0}}
    with (
        served(create_app(AsyncEngine(engine), engine.tokenizer, model_name="tiny")) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        whole, (message, _) = ask(client, **body), streamed(client, **body)
        assert whole.content[0].text == message.content[0].text != ""
        assert message.usage.cache_read_input_tokens + message.usage.input_tokens == whole.usage.input_tokens
        assert ask(client, tools=[WEATHER], **body).usage.input_tokens > whole.usage.input_tokens


def test_tools_that_the_model_cannot_see_are_refused(bare: Model) -> None:
    with anthropic.Anthropic(base_url=str(bare.client.base_url).removesuffix("/v1/"), api_key="none") as client:
        assert "tool calls" in refused(lambda: ask(client, tools=[WEATHER]))
