"""POST /v1/completions: prompts to requests, outputs to OpenAI's text-completion JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.sequence import Completion, Request, SampleOutput, TokenLogprob
from moe_serve.server.endpoints.answers import generation
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger, Usage, json_logprob
from moe_serve.server.endpoints.answers.prompt_scores import prompt_scores
from moe_serve.server.endpoints.bodies import prompts, unsupported_fields
from moe_serve.server.endpoints.bodies.common_fields import in_range
from moe_serve.server.endpoints.bodies.given import TheService, parsed, prepared
from moe_serve.server.endpoints.bodies.json_types import Flag, Int, JsonList
from moe_serve.server.endpoints.bodies.sampling_body import SamplingBody
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal
from moe_serve.text.detokenizer import token_starts
from moe_serve.text.tokenizer import Tokenizer

MAX_PROMPTS = 128

router = APIRouter()


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | JsonList[str] | JsonList[Int] | JsonList[JsonList[Int]]
    """Text, token ids, or up to 128 of either."""
    max_tokens: Int | None = 16
    """16, as in the OpenAI API; null: to the end of the context; 0: only the prompt is computed."""
    logprobs: Int | None = in_range(0, 20)
    """0 to 20 alternatives for each token."""
    echo: Flag | None = None
    """Repeat the prompt's text; with logprobs, also say how likely each of its tokens was."""
    add_special_tokens: Flag = True
    """Let the tokenizer add its start token."""

    unsupported: ClassVar[Mapping[str, Refusal]] = unsupported_fields.COMPLETION


@router.post("/v1/completions")
async def create_completion(
    body: Annotated[CompletionBody, Depends(parsed(CompletionBody))], service: TheService, http: HttpRequest
) -> Response:
    """Go on with a text, or with several."""
    service.check_model(body.model)
    request_id = generation.request_id("cmpl-", body, http)
    merger = AnswerMerger(await prepared(http, lambda: requests_of(body, request_id, service)))
    shapes = CompletionShapes(body, request_id, service.model_name, service.tokenizer, merger)
    events = generation.chunks(service, body, merger, shapes) if body.stream else None
    return await generation.answer(service, http, merger, shapes.whole, events)


def requests_of(body: CompletionBody, request_id: str, service: TheService) -> list[Request]:
    """One request for each prompt of the body."""
    body.check_stream()
    more = {"grammar": body.grammar(), "bad_words": prompts.bad_words(body.bad_words, service.tokenizer)}
    params = body.sampling_params(service.sampling_defaults, body.max_tokens, body.logprobs, **more)
    if body.echo and params.prompt_logprobs is None:
        params = replace(params, prompt_logprobs=params.logprobs)
    now, priority, salt = time.monotonic(), body.priority or 0, body.cache_salt or ""
    return [
        Request(f"{request_id}-{i}" if i else request_id, prompt, params, now, priority, salt)
        for i, prompt in enumerate(_prompts_of(body, service.tokenizer, service.max_model_len))
    ]


def _prompts_of(body: CompletionBody, tokenizer: Tokenizer, max_model_len: int) -> list[tuple[int, ...]]:
    """Token ids of each prompt in the body."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if not given or len(given) > MAX_PROMPTS:
        raise InvalidRequestError("prompt", f"prompt must hold 1 to {MAX_PROMPTS} prompts, got {len(given)}")
    most = prompts.most_tokens(body, max_model_len)
    tokenized = [tokenizer.encode(p, body.add_special_tokens, most) if isinstance(p, str) else p for p in given]
    return [prompts.truncated(p, body, body.max_tokens, max_model_len) for p in tokenized]


class CompletionShapes:
    """The JSON of one request's answer, whole or in chunks."""

    def __init__(
        self, body: CompletionBody, request_id: str, model: str, tokenizer: Tokenizer, merger: AnswerMerger
    ) -> None:
        self._body = body
        self._head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._merger = merger
        self._echoes: dict[int, str] = {}
        """Texts of prompts, by their position."""
        self._begun: set[int] = set()
        """Choices with text already sent."""

    def whole(self, choices: Sequence[Completion]) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        shaped = [
            self._choice(c.index, c.text, c.token_ids, c.logprobs, c.text_starts, c.finish_reason, c.stop_reason)
            for c in choices
        ]
        return {**self._head, "choices": shaped, "usage": self._merger.usage.as_json()}

    def first_chunks(self) -> list[dict[str, Any]]:
        return []

    def chunk(self, index: int, output: SampleOutput) -> dict[str, Any] | None:
        """One streamed chunk, or None when the output shows nothing yet."""
        if not output.text and output.finish_reason is None and not output.logprobs and not self._body.return_token_ids:
            return None
        choice = self._choice(
            index,
            output.text,
            output.token_ids,
            output.logprobs,
            output.text_starts,
            output.finish_reason,
            output.stop_reason,
        )
        return {**self._head, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.as_json()}

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        text_starts: Sequence[int],
        finish_reason: Any,
        stop_reason: int | str | None,
    ) -> dict[str, Any]:
        is_first = index not in self._begun
        self._begun.add(index)
        choice = {
            "index": index,
            "text": self._echo(index) + text if is_first else text,
            "logprobs": self._logprobs(index, logprobs, text_starts, is_first)
            if self._body.logprobs is not None
            else None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_scores(self._scores(index), self._tokenizer)
        if self._body.return_token_ids:
            choice["token_ids"] = list(token_ids)
            if is_first:
                choice["prompt_token_ids"] = list(self._prompt(index))
        return choice

    def _echo(self, index: int) -> str:
        """The prompt's text, when the request asked for it."""
        if not self._body.echo:
            return ""
        position = index // self._merger.requests[0].params.n
        if position not in self._echoes:
            self._echoes[position] = self._tokenizer.decode(self._prompt(index))
        return self._echoes[position]

    def _request(self, index: int) -> Request:
        return self._merger.requests[index // self._merger.requests[0].params.n]

    def _prompt(self, index: int) -> tuple[int, ...]:
        return self._request(index).prompt_token_ids

    def _scores(self, index: int) -> tuple[TokenLogprob, ...]:
        """Of the choice's prompt but its first token."""
        return self._merger.scores_of(self._request(index).request_id)

    def _logprobs(
        self, index: int, logprobs: Sequence[TokenLogprob], text_starts: Sequence[int], is_first: bool
    ) -> dict[str, Any]:
        """OpenAI's legacy shape: parallel lists over tokens, those of an echoed prompt first."""
        ids = [p.token_id for p in logprobs]
        known: list[TokenLogprob | None] = list(logprobs)
        if is_first and self._body.echo:
            ids = [*self._prompt(index), *ids]
            known = [None, *self._scores(index), *known]
        echoed = token_starts(self._tokenizer, self._prompt(index)) if is_first and self._body.echo else []
        start = len(self._echo(index))
        return {
            "tokens": [self._shown(i) for i in ids],
            "token_logprobs": [None if p is None else json_logprob(p.logprob) for p in known],
            "top_logprobs": [None if p is None else self._top(p) for p in known] if self._body.logprobs else None,
            "text_offset": [*echoed, *(start + own for own in text_starts)],
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens by their text; where texts are equal, the likelier one's value."""
        found: dict[str, float] = {}
        for token_id, value in logprob.top:
            found.setdefault(self._shown(token_id), json_logprob(value))
        return found

    def _shown(self, token_id: int) -> str:
        as_id = self._body.return_tokens_as_token_ids
        return f"token_id:{token_id}" if as_id else self._tokenizer.token_text(token_id)
