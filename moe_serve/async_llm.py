"""AsyncLLM: the engine inside an asyncio program, many requests at once. `async with AsyncLLM(path) as llm`.

Knows AsyncEngine and LLM's prompts; knows no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from os import PathLike
from typing import Any, Self

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.llm import Message, Prompt, RequestResult, empty_result, load_engine, request_for
from moe_serve.scheduling.sequence import Request, SampleOutput, SamplingParams
from moe_serve.text.tokenizer import Tokenizer


class AsyncLLM:
    """A loaded model for an asyncio program. Requests that run at the same time share the engine's steps.

    `model` and the keyword arguments are those of LLM. Loading happens here and blocks; an event loop is needed from
    `async with` or `start` on.
    """

    def __init__(self, model: str | PathLike[str], **settings: Any) -> None:
        self.ranks, core = load_engine("AsyncLLM", model, settings)
        """The engine over ranks; None on one device."""
        self.engine = AsyncEngine(core)
        self.tokenizer = core.tokenizer
        self._ids = itertools.count()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def start(self) -> None:
        """Start the engine's thread; on the event loop, once."""
        self.engine.start()

    async def aclose(self) -> None:
        """Abort what still runs and stop the engine's thread."""
        await self.engine.shutdown()

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestResult:
        """Complete one prompt. For several, gather several calls: they are computed together.

        InvalidRequestError: an impossible request. OverloadedError: the queue is full. Cancelling aborts the request.
        """
        request = self._request(prompt, params)
        result = empty_result(request)
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                result.apply(output)
        return result

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[SampleOutput]:
        """Complete one prompt, yielding each step's gain. Closing the generator aborts the request."""
        async with aclosing(self._outputs(self._request(prompt, params))) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> RequestResult:
        """Answer a conversation, rendered with the model's chat template."""
        return await self.generate(await self.render_chat(messages, **template_kwargs), params)

    async def render_chat(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation, ready for `generate` or `stream`."""
        return await asyncio.to_thread(
            self.tokenizer.render_chat, list(messages), chat_template_kwargs=template_kwargs or None
        )

    def get_tokenizer(self) -> Tokenizer:
        """`tokenizer`, by vLLM's name."""
        return self.tokenizer

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        return request_for(prompt, params or SamplingParams(), self.tokenizer, next(self._ids))

    async def _outputs(self, request: Request) -> AsyncGenerator[SampleOutput]:
        """A failed sample raises."""
        async with aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                yield output
