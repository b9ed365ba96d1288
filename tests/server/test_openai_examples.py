"""The documented uses of the openai client, against the demo model.

Responses (whole, streamed, stored, with tools, with reasoning, structured), chat completions (the same), completions,
raw answers, errors and the list of models. Embeddings, images, sound, files, batches and realtime are not served.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

MODEL = "gpt-5.2"
INPUT = "How do I check if a Python object is an instance of a class?"
ASK: Any = [
    {"role": "developer", "content": "Talk like a pirate."},
    {"role": "user", "content": INPUT},
]
PARAMETERS: Any = {
    "type": "object",
    "properties": {"location": {"type": "string", "enum": ["Paris"]}},
    "required": ["location"],
    "additionalProperties": False,
}
FLAT_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True}}

pytestmark = pytest.mark.slow


class Answer(pydantic.BaseModel):
    is_true: bool


class GetWeather(pydantic.BaseModel):
    is_hot: bool


@pytest.fixture
def client(demo_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def respond(client: openai.OpenAI, **body: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL, "input": INPUT, "max_output_tokens": 24} | body
    return client.responses.create(**fields)


def chat(client: openai.OpenAI, **body: Any) -> Any:
    fields: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_completion_tokens": 24} | body
    return client.chat.completions.create(**fields)


def test_a_response(client: openai.OpenAI) -> None:
    response = respond(client, instructions="You are a coding assistant that talks like a pirate.")
    assert response.output_text
    assert response._request_id


def test_a_chat_completion(client: openai.OpenAI) -> None:
    assert chat(client).choices[0].message.content


def test_asynchronous_clients(demo_url: str) -> None:
    async def main() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{demo_url}/v1", api_key="none") as client:
            whole = await client.responses.create(model=MODEL, input=INPUT, max_output_tokens=8)
            stream = await client.responses.create(model=MODEL, input=INPUT, max_output_tokens=8, stream=True)
            return whole.output_text, [event.type async for event in stream][-1]

    text, last = asyncio.run(main())
    assert text
    assert last in ("response.completed", "response.incomplete")


def test_streams(client: openai.OpenAI) -> None:
    kinds = [event.type for event in respond(client, stream=True)]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    chunks = list(chat(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_helpers_for_streams(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=INPUT) as responses:
        deltas = "".join(event.delta for event in responses if event.type == "response.output_text.delta")
        assert deltas == responses.get_final_response().output_text != ""
    with client.chat.completions.stream(model=MODEL, messages=ASK) as chats:
        deltas = "".join(event.delta for event in chats if event.type == "content.delta")
        assert deltas == chats.get_final_completion().choices[0].message.content != ""


def test_tools_that_the_model_may_use(client: openai.OpenAI) -> None:
    assert respond(client, tools=[FLAT_TOOL]).output
    assert chat(client, tools=[TOOL]).choices[0].message.role == "assistant"


def test_tools_that_it_must_use_and_their_results(client: openai.OpenAI) -> None:
    one: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    response = respond(client, tools=[FLAT_TOOL], **one, max_output_tokens=200)
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments) == {"location": "Paris"}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "15"}
    turns = [{"role": "user", "content": INPUT}, *response.output, result]
    assert respond(client, input=turns, tools=[FLAT_TOOL]).output
    message = chat(client, tools=[TOOL], **one, max_completion_tokens=200).choices[0].message
    tool_call = message.tool_calls[0]
    answer: Any = {"role": "tool", "tool_call_id": tool_call.id, "content": "15"}
    assert chat(client, messages=[*ASK, message, answer], tools=[TOOL]).choices


def test_reasoning(client: openai.OpenAI) -> None:
    """A chat refuses an effort that the model's template cannot use, as OpenAI's models without reasoning do."""
    reasoning: Any = {"effort": "low", "summary": "auto"}
    assert respond(client, reasoning=reasoning).status in ("completed", "incomplete")
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        chat(client, reasoning_effort="low")


def test_structured_outputs(client: openai.OpenAI) -> None:
    response = client.responses.parse(model=MODEL, input=INPUT, text_format=Answer)
    assert isinstance(response.output_parsed, Answer)
    completion = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Answer)
    assert isinstance(completion.choices[0].message.parsed, Answer)
    tool = openai.pydantic_function_tool(GetWeather)
    forced: Any = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    called = client.chat.completions.parse(model=MODEL, messages=ASK, **forced)
    (call,) = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_stored_responses(client: openai.OpenAI) -> None:
    first = respond(client, store=True)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = respond(client, previous_response_id=first.id, input="And a subclass?")
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_completions_and_raw_answers(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="Say this is a test", max_tokens=7, temperature=0)
    assert completion.choices[0].text
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ASK, max_completion_tokens=4)
    assert raw.headers["x-request-id"]
    assert raw.parse().choices
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=ASK, max_completion_tokens=4
    ) as answer:
        assert "".join(answer.iter_lines())


def test_errors_and_options(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        respond(client, model="unknown")
    with pytest.raises(openai.BadRequestError):
        respond(client, max_output_tokens=0)
    assert (
        client.with_options(max_retries=5, timeout=60.0)
        .responses.create(model=MODEL, input=INPUT, max_output_tokens=4)
        .output_text
    )


def test_the_list_of_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
