"""The documented uses of the anthropic client, against the demo model.

Messages, streams, helpers for streams, counted tokens, tools, the tool runner, thinking, structured outputs, raw
answers, errors and the list of models. Message batches and files are not: they need a server that keeps them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest

MODEL = "claude-opus-4-6"
HELLO: Any = [{"role": "user", "content": "Hello, Claude"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the current weather in a given location",
    "input_schema": {
        "type": "object",
        "properties": {"location": {"type": "string", "enum": ["San Francisco, CA"]}},
        "required": ["location"],
        "additionalProperties": False,
    },
}

pytestmark = pytest.mark.slow


@pytest.fixture
def client(demo_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=demo_url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(max_tokens=64, messages=HELLO, model=MODEL)
    assert (message.type, message.role) == ("message", "assistant")
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert text_of(message)
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_an_asynchronous_message(demo_url: str) -> None:
    async def main() -> str:
        async with anthropic.AsyncAnthropic(base_url=demo_url, api_key="none") as client:
            return text_of(await client.messages.create(max_tokens=16, messages=HELLO, model=MODEL))

    assert asyncio.run(main())


def test_a_stream_of_events(client: anthropic.Anthropic) -> None:
    stream = client.messages.create(max_tokens=16, messages=HELLO, model=MODEL, stream=True)
    kinds = [event.type for event in stream]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_the_helper_for_streams(client: anthropic.Anthropic) -> None:
    with client.messages.stream(max_tokens=16, messages=HELLO, model=MODEL) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == text_of(message) != ""


def test_an_asynchronous_stream(demo_url: str) -> None:
    async def main() -> tuple[str, str]:
        async with (
            anthropic.AsyncAnthropic(base_url=demo_url, api_key="none") as client,
            client.messages.stream(max_tokens=16, messages=HELLO, model=MODEL) as stream,
        ):
            text = "".join([piece async for piece in stream.text_stream])
            return text, text_of(await stream.get_final_message())

    text, final = asyncio.run(main())
    assert text == final != ""


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model=MODEL, messages=HELLO)
    message = client.messages.create(max_tokens=1, messages=HELLO, model=MODEL)
    usage = message.usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0) > 0


def test_a_tool_that_the_model_may_use(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather like in San Francisco?"}]
    message = client.messages.create(max_tokens=32, tools=[WEATHER], messages=messages, model=MODEL)
    assert message.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_a_tool_that_it_must_use_and_its_result(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather like in San Francisco?"}]
    choice: Any = {"type": "tool", "name": "get_weather"}
    body: Any = {"max_tokens": 200, "tools": [WEATHER], "model": MODEL}
    message = client.messages.create(**body, tool_choice=choice, messages=messages)
    tool = next(block for block in message.content if block.type == "tool_use")
    assert (message.stop_reason, tool.name, tool.input) == (
        "tool_use",
        "get_weather",
        {"location": "San Francisco, CA"},
    )
    result: Any = [{"type": "tool_result", "tool_use_id": tool.id, "content": "15 degrees"}]
    turns = [*messages, {"role": "assistant", "content": message.content}, {"role": "user", "content": result}]
    assert client.messages.create(**body | {"max_tokens": 16}, messages=turns).role == "assistant"


def test_the_tool_runner(client: anthropic.Anthropic) -> None:
    """Which is refused a thread, and goes on without one."""

    @anthropic.beta_tool
    def get_weather(location: str) -> str:
        """Look up the weather for a city.

        Args:
            location: The city.
        """
        return f"15 degrees in {location}"

    runner = client.beta.messages.tool_runner(max_tokens=16, model=MODEL, tools=[get_weather], messages=HELLO)
    assert runner.until_done().role == "assistant"


def test_thinking(client: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1600}
    served = "gpt-5.2"  # of names of its own the client knows which it warns of
    message = client.messages.create(model=served, max_tokens=3200, thinking=thinking, messages=HELLO)
    assert {block.type for block in message.content} <= {"thinking", "text"}
    adaptive: Any = {"type": "adaptive"}
    with client.messages.stream(model=MODEL, max_tokens=16, thinking=adaptive, messages=HELLO) as stream:
        assert {event.type for event in stream} >= {"message_start", "message_stop"}


class Answer(pydantic.BaseModel):
    is_true: bool


def test_structured_outputs(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(model=MODEL, max_tokens=64, messages=HELLO, output_format=Answer)
    assert isinstance(message.parsed_output, Answer)


def test_raw_and_streamed_answers(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(max_tokens=4, messages=HELLO, model=MODEL)
    assert raw.headers["x-request-id"]
    assert raw.parse().role == "assistant"
    with client.messages.with_streaming_response.create(max_tokens=4, messages=HELLO, model=MODEL) as answer:
        assert "".join(answer.iter_lines())


def test_errors_and_options(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(max_tokens=4, messages=HELLO, model="unknown")
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(max_tokens=0, messages=HELLO, model=MODEL)
    patient = client.with_options(max_retries=5, timeout=60.0)
    assert patient.messages.create(max_tokens=4, messages=HELLO, model=MODEL).content


def test_the_list_of_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list(limit=20)] == ["gpt-5.2"]
    assert client.models.retrieve("gpt-5.2").id == "gpt-5.2"
