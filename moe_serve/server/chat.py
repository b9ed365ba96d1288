"""/v1/chat/completions: messages to a request, outputs to OpenAI's chat JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from moe_serve.sequence import Completion, SampleOutput, TokenLogprob
from moe_serve.server.collect import Merger, Usage, json_logprob
from moe_serve.server.protocol import ChatBody, Message
from moe_serve.tokenizer import Tokenizer


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: dict[str, Any] | None,
) -> tuple[int, ...]:
    """Token ids of a conversation."""
    return tuple(
        tokenizer.render_chat(
            [m.as_template_input(i) for i, m in enumerate(messages)],
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            chat_template_kwargs=template_kwargs,
        )
    )


class ChatShapes:
    """The JSON of one request's answer, whole or in chunks."""

    def __init__(self, body: ChatBody, request_id: str, model: str, tokenizer: Tokenizer, merger: Merger) -> None:
        self._body = body
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._merger = merger

    def whole(self, choices: Sequence[Completion]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        shaped = [self._whole_choice(c) for c in choices]
        usage = self._merger.usage.as_json()
        return {**self._head, "object": "chat.completion", "choices": shaped, "usage": usage}

    def _whole_choice(self, choice: Completion) -> dict[str, Any]:
        shaped = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            shaped["token_ids"] = choice.token_ids
        return shaped

    def first_chunks(self) -> list[dict[str, Any]]:
        """One chunk per choice that only names the role."""
        count = sum(r.params.n for r in self._merger.requests)
        return [self._chunk(i, {"role": "assistant", "content": ""}, None, None, None) for i in range(count)]

    def chunk(self, index: int, output: SampleOutput) -> dict[str, Any] | None:
        """One streamed chunk, or None when the output shows nothing yet."""
        if not output.text and output.finish_reason is None and not output.logprobs and not self._body.return_token_ids:
            return None
        delta = {"content": output.text} if output.text else {}
        chunk = self._chunk(index, delta, self._logprobs(output.logprobs), output.finish_reason, output.stop_reason)
        if self._body.return_token_ids:
            chunk["choices"][0]["token_ids"] = list(output.token_ids)
        return chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.as_json()}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: Any, stop_reason: Any
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """OpenAI's chat shape: one object per token."""
        if not self._body.logprobs:
            return None
        return {"content": [{**self._token(p.token_id, p.logprob), "top_logprobs": self._top(p)} for p in logprobs]}

    def _top(self, logprob: TokenLogprob) -> list[dict[str, Any]]:
        return [self._token(token_id, value) for token_id, value in logprob.top]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": json_logprob(logprob), "bytes": raw}
