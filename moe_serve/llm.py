"""LLM: the engine for offline use, without a server. `LLM(path).generate(["Once upon a time"])`.

Knows the engine and the tokenizer; knows no threads and no HTTP.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from moe_serve.config import EngineConfig
from moe_serve.config.settings import refuse_no_effect, sort_out
from moe_serve.errors import InvalidRequestError, MoEServeError
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.start import make_engine
from moe_serve.scheduling.sequence import Completion, Request, SampleOutput, SamplingParams, TokenLogprob

Prompt = str | Sequence[int]


@dataclass(slots=True)
class RequestResult:
    """A prompt and its finished samples, by index."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: list[Completion]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt but its first token, where SamplingParams.prompt_logprobs asked for them."""

    def _apply(self, output: SampleOutput) -> None:
        self.completions[output.index].add(output)
        if output.index == 0:
            self.num_cached_tokens = output.num_cached_tokens
            self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs


class LLM:
    """A loaded model. Keyword arguments are the flags' names: settings of EngineConfig and, for several devices,
    of ParallelConfig (`moe_cache_mib=64`), or whole parts (`experts=ExpertCacheConfig(cache_mib=64)`)."""

    def __init__(self, model: str, **settings: Any) -> None:
        engine, ranks = sort_out("LLM", {"model": model, **settings}, EngineConfig, ParallelConfig)
        config, parallel = EngineConfig.from_dict(engine), ParallelConfig.from_dict(ranks)
        refuse_no_effect(config, parallel)
        self.engine = make_engine(config, parallel)
        self.tokenizer = self.engine.tokenizer
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = False,
    ) -> list[RequestResult]:
        """Complete all prompts (texts or token ids) together; results in their order.

        Raises InvalidRequestError before anything runs if one of them is impossible.
        """
        pairs = zip(prompts, _spread(params, len(prompts)), strict=True)
        requests = [self._request(prompt, p) for prompt, p in pairs]
        results = {r.request_id: _empty_result(r) for r in requests}
        for request in requests:
            self.engine.check_request(request)
        for request in requests:
            self.engine.add_request(request)
        with tqdm(total=sum(r.params.n for r in requests), disable=not show_progress, unit="sample") as bar:
            for output in self._run(set(results)):
                results[output.request_id]._apply(output)
                bar.update(output.finish_reason is not None)
        return list(results.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[SampleOutput]:
        """Complete one prompt, yielding each step's gain. Closing the iterator aborts the request."""
        request = self._request(prompt, params or SamplingParams())
        self.engine.add_request(request)
        try:
            yield from self._run({request.request_id})
        finally:
            self.engine.abort(request.request_id)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> RequestResult:
        """Answer a conversation, rendered with the model's chat template."""
        return self.generate([self.render_chat(messages, **template_kwargs)], params)[0]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation, ready for `generate` or `stream`."""
        return self.tokenizer.render_chat(list(messages), chat_template_kwargs=template_kwargs or None)

    def close(self) -> None:
        """Stop the threads behind the model. Dropping the last reference does the same."""
        self.engine.close()

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Request(f"llm-{next(self._ids)}", tuple(ids), params, time.monotonic())

    def _run(self, request_ids: set[str]) -> Iterator[SampleOutput]:
        """Step until the given requests have nothing left; a failed sample raises."""
        while self.engine.has_work():
            for output in self.engine.step():
                if output.request_id in request_ids:
                    if output.error is not None:
                        raise MoEServeError(output.error)
                    yield output


def _empty_result(request: Request) -> RequestResult:
    return RequestResult(request.request_id, request.prompt_token_ids, [Completion(i) for i in range(request.params.n)])


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(
            "params", f"{len(params)} sampling parameters for {count} prompts; give one or one each"
        )
    return params
