"""POST /v1/responses through the real openai client, against the real server, engine and sampler."""

from __future__ import annotations

import functools
import json
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest

from moe_serve.server.endpoints.bodies.responses_input import messages_of
from tests.server.scripted_model import Model, refused_param
from tests.server.test_tools_and_grammars import CALL, PARAMETERS, VERDICT

WEATHER: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
CLOCK: Any = {"type": "function", "name": "clock", "description": "The time.", "parameters": None, "strict": None}


def ask(served: Model, **body: Any) -> Any:
    extra = {"seed": 1, **body.pop("extra_body", {})}
    return served.client.responses.create(**({"model": "tiny", "input": "The weather?"} | body), extra_body=extra)


def streamed(served: Model, **body: Any) -> tuple[Any, list[Any]]:
    """(the response put together from the events by the client, the events)."""
    body = {"model": "tiny", "input": "The weather?", "extra_body": {"seed": 1}} | body
    with served.client.responses.stream(**body) as events:
        seen = list(events)
    last = seen[-1]
    assert last.type == "response.completed" or last.type == "response.incomplete" or last.type == "response.failed"
    return last.response, seen


def without_ids(items: Any) -> Any:
    """Items without what differs between two runs."""
    return [{k: v for k, v in i.model_dump().items() if k not in ("id", "call_id", "parsed_arguments")} for i in items]


def test_text_whole_and_streamed(hermes: Model) -> None:
    hermes.says("It rains.")
    whole = ask(hermes, instructions="Be short.", metadata={"k": "v"})
    assert (whole.output_text, whole.status, whole.error) == ("It rains.", "completed", None)
    assert (whole.instructions, whole.metadata, whole.store) == ("Be short.", {"k": "v"}, True)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    response, events = streamed(hermes, instructions="Be short.")
    assert response.output_text == "It rains."
    assert [e.type for e in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [e.type for e in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [e.sequence_number for e in events] == sorted({e.sequence_number for e in events})
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == "It rains."
    assert len(deltas) > 1
    assert response.usage.output_tokens == whole.usage.output_tokens


def test_instructions_are_a_system_message(hermes: Model) -> None:
    short, long = ask(hermes, max_output_tokens=1), ask(hermes, max_output_tokens=1, instructions="Be short.")
    assert long.usage.input_tokens > short.usage.input_tokens


def test_what_is_cut_off_is_incomplete(hermes: Model) -> None:
    for response in (ask(hermes, max_output_tokens=3), streamed(hermes, max_output_tokens=3)[0]):
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage.output_tokens == 3


def test_calls_and_their_results(hermes: Model) -> None:
    hermes.says(f"Let me see.\n{CALL}")
    whole, (response, events) = ask(hermes, tools=[WEATHER]), streamed(hermes, tools=[WEATHER])
    for found in (whole, response):
        message, call = found.output
        assert (message.type, message.content[0].text.strip(), call.type, call.name) == (
            "message",
            "Let me see.",
            "function_call",
            "weather",
        )
        assert json.loads(call.arguments) == {"city": "Oslo", "days": 2}
        assert call.call_id.startswith("call_")
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments) == {"city": "Oslo", "days": 2}
    hermes.says("It rains in Oslo.")
    result: Any = {"type": "function_call_output", "call_id": whole.output[1].call_id, "output": "rain"}
    turns = [{"role": "user", "content": "The weather?"}, *whole.output, result]
    assert ask(hermes, input=turns, tools=[WEATHER]).output_text == "It rains in Oslo."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_forced_calls(hermes: Model, choice: Any) -> None:
    whole = ask(hermes, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    response, _ = streamed(hermes, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    assert without_ids(whole.output) == without_ids(response.output)
    (call,) = whole.output
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)


def test_structured_text(hermes: Model) -> None:
    class Verdict(pydantic.BaseModel):
        rain: bool

    schema = VERDICT["json_schema"]["schema"]
    text: Any = {"format": {"type": "json_schema", "name": "verdict", "schema": schema, "strict": True}}
    jsonschema.validate(json.loads(ask(hermes, text=text).output_text), schema)
    parsed = hermes.client.responses.parse(model="tiny", input="Rain?", text_format=Verdict, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Verdict)


def test_reasoning_is_an_item_of_its_own_and_may_be_sent_back(hermes: Model) -> None:
    hermes.says("<think>\nHm, rain.\n</think>It rains.")
    for response in (ask(hermes), streamed(hermes)[0]):
        thought, message = response.output
        assert (thought.type, thought.content[0].text.strip()) == ("reasoning", "Hm, rain.")
        assert message.content[0].text.strip() == "It rains."
        assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    turns = [{"role": "user", "content": "The weather?"}, *response.output, {"role": "user", "content": "Why?"}]
    assert ask(hermes, input=turns).status == "completed"


def test_logprobs(hermes: Model) -> None:
    hermes.says("It rains.")
    body: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole, (response, _) = ask(hermes, **body), streamed(hermes, **body)
    for found in (whole, response):
        entries = found.output[0].content[0].logprobs
        assert "".join(entry.token for entry in entries).startswith("It rains.")
        assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_an_id_of_the_clients_own(hermes: Model) -> None:
    answer = httpx.post(
        f"{hermes.client.base_url}responses", json={"input": "x", "max_output_tokens": 1, "request_id": "mine"}
    )
    assert answer.headers["x-request-id"] == answer.json()["id"] == "resp_mine"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"input": []}, "input"),
    ({"input": [{"role": "nobody", "content": "x"}]}, "input"),
    ({"input": [{"type": "web_search_call", "id": "1"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "input"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input"),
    ({"input": "word " * 2000}, "input"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"tools": [{"type": "web search"}]}, "tools"),
    ({"tools": [{"type": "custom"}]}, "tools"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objct"}}}}, "text"),
    ({"text": {"verbosity": "low"}}, "text"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"extra_body": {"n": 2}}, "n"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_by_its_name_here(hermes: Model, stream: bool) -> None:
    for body, param in REFUSED:
        assert refused_param(functools.partial(ask, hermes, stream=stream, **body)) == param, body


def test_tools_that_the_model_cannot_see_are_refused(bare: Model) -> None:
    assert refused_param(lambda: ask(bare, tools=[WEATHER], tool_choice="required")) == "tools"


def test_another_model_is_not_found(hermes: Model) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(hermes, model="other")


def test_a_failure_in_mid_stream_is_the_last_event(make: Any) -> None:
    served = make()
    served.fail_after_a_step()
    response = served.talk(("/v1/responses", {"input": "x", "stream": True}))[0]
    events = [json.loads(e.split("data: ")[1]) for e in response.text.strip().split("\n\n")]
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "failed"
    assert "failed" in events[-1]["response"]["error"]["message"]


def test_a_turn_of_several_items_is_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
    ]
    calls = [
        {"id": i, "type": "function", "function": {"name": n, "arguments": "{}"}} for i, n in (("1", "f"), ("2", "g"))
    ]
    assert messages_of(items, None) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "reasoning_content": "hm", "content": "Wait.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
    ]


@pytest.mark.parametrize("strict", [0.0, 1, "true"])
def test_strict_is_true_or_false_and_nothing_like_it(hermes: Model, strict: Any) -> None:
    """schemathesis sent 0.0, which was taken for false."""
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": strict}}
    assert refused_param(lambda: ask(hermes, text=text)) == "text"
    assert refused_param(lambda: ask(hermes, tools=[WEATHER | {"strict": strict}])) == "tools"
