"""The official openai client against a real uvicorn."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

HELLO: Any = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["fake-model"]
    assert client.models.retrieve("fake-model").owned_by == "moe-serve"


def test_completion_whole_and_streamed_agree(client: openai.OpenAI, sentence: str) -> None:
    whole = client.completions.create(model="fake-model", prompt="x", max_tokens=20, logprobs=2)
    assert whole.choices[0].text.startswith(sentence[:30])
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    chunks = list(client.completions.create(model="fake-model", prompt="x", max_tokens=20, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="fake-model", messages=HELLO, max_completion_tokens=30, logprobs=True, top_logprobs=2
    )
    message, logprobs = whole.choices[0].message, whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 30
    stream = client.chat.completions.create(
        model="fake-model",
        messages=HELLO,
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == message.content
    assert chunks[-1].usage == whole.usage


def test_async_client_serves_many_at_once(live: str) -> None:
    async def one(client: openai.AsyncOpenAI, stream: bool) -> str:
        if not stream:
            whole = await client.chat.completions.create(model="fake-model", messages=HELLO, max_tokens=25)
            return whole.choices[0].message.content or ""
        chunks = await client.chat.completions.create(model="fake-model", messages=HELLO, max_tokens=25, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def run() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
            completion = await client.completions.create(model="fake-model", prompt="x", max_tokens=25)
            texts = await asyncio.gather(*(one(client, i % 2 == 0) for i in range(16)))
            return {*texts, completion.choices[0].text}

    assert len(asyncio.run(run())) == 1


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake-model", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="fake-model", prompt="x", max_tokens=10_000, stream=True)
    assert long.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="fake-model", input="x")


def test_leaving_a_stream_aborts_the_request(client: openai.OpenAI, served: Any, until: Any) -> None:
    served.engine.delay_s = 0.01
    stream = client.completions.create(model="fake-model", prompt="x", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: served.engine.aborted)
    assert not served.engine.finished


def test_a_client_that_times_out_aborts_the_request(client: openai.OpenAI, served: Any, until: Any) -> None:
    served.engine.delay_s = 0.02
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="fake-model", prompt="x", max_tokens=400, timeout=1)
    until(lambda: served.engine.aborted)
    assert not served.engine.finished
