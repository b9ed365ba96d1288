"""LLM: the engine for offline use, without a server. `LLM(path).generate("Once upon a time")`.

Knows the engine and the tokenizer; knows no threads and no HTTP.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

from tqdm import tqdm

from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.config.settings import refuse_no_effect, sort_out
from moe_serve.engine.engine import Engine
from moe_serve.errors import InvalidRequestError
from moe_serve.hub.find import find_model
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.parallel.front.start import engine_over_ranks
from moe_serve.scheduling.field_types import token_ids
from moe_serve.scheduling.sequence import Completion, Request, SampleOutput, SamplingParams, TokenLogprob
from moe_serve.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or {"prompt": text} or {"prompt_token_ids": ids}."""
Message = Mapping[str, Any]
"""{"role": ..., "content": ...}"""


@dataclass(slots=True)
class RequestResult:
    """A prompt and its finished samples, by index."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: list[Completion]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt but its first token, where SamplingParams.prompt_logprobs asked for them."""

    @property
    def outputs(self) -> list[Completion]:
        """`completions`, by vLLM's name."""
        return self.completions

    def apply(self, output: SampleOutput) -> None:
        """Append what one step added."""
        self.completions[output.index].add(output)
        if output.index == 0:
            self.num_cached_tokens = output.num_cached_tokens
            self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs


class LLM:
    """A loaded model; also a context manager, which closes it.

    `model`: a checkpoint folder, or a model id in the local Hugging Face cache. Keyword arguments are the flags' names:
    settings of EngineConfig and, for several devices, of ParallelConfig (`moe_cache_mib=64`), or whole parts
    (`experts=ExpertCacheConfig(cache_mib=64)`). ConfigError names a setting that is unknown, wrong or without effect.
    """

    def __init__(self, model: str | PathLike[str], **settings: Any) -> None:
        self.ranks, self.engine = load_engine("LLM", model, settings)
        """`ranks`: the engine over ranks; None on one device."""
        self.tokenizer = self.engine.tokenizer
        self._ids = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        show_progress: bool = False,
    ) -> list[RequestResult]:
        """Complete one prompt, or several together; results in their order. `sampling_params`: vLLM's name of `params`.

        Without `params`, an answer ends at the model's end-of-sequence token or with the context: give
        SamplingParams(max_tokens=N) for a limit. Raises InvalidRequestError before anything runs if one of the requests
        is impossible.
        """
        _refuse_both(params, sampling_params)
        params = params if params is not None else sampling_params
        several = prompt_list(prompts)
        pairs = zip(several, params_list(params, len(several)), strict=True)
        requests = [self._request(prompt, p) for prompt, p in pairs]
        results = {r.request_id: empty_result(r) for r in requests}
        for request in requests:
            self.engine.check_request(request)
        for request in requests:
            self.engine.add_request(request)
        with tqdm(total=sum(r.params.n for r in requests), disable=not show_progress, unit="sample") as bar:
            for output in self._run(set(results)):
                results[output.request_id].apply(output)
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
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestResult]:
        """Answer one conversation, or several together. A list in their order, of one for one, as in vLLM.

        `sampling_params`: `params`, by vLLM's name. `template_kwargs`: variables of the chat template.
        """
        prompts = [self.render_chat(each, **template_kwargs) for each in conversation_list(messages)]
        return self.generate(prompts, params, sampling_params=sampling_params)

    def render_chat(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation, ready for `generate` or `stream`."""
        return self.tokenizer.render_chat(list(messages), chat_template_kwargs=template_kwargs or None)

    def get_tokenizer(self) -> Tokenizer:
        """`tokenizer`, by vLLM's name."""
        return self.tokenizer

    def close(self) -> None:
        """Stop the threads behind the model. Dropping the last reference does the same."""
        self.engine.close()

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        return request_for(prompt, params, self.tokenizer, next(self._ids))

    def _run(self, request_ids: set[str]) -> Iterator[SampleOutput]:
        """Step until the given requests have nothing left; a failed sample raises."""
        while self.engine.has_work():
            for output in self.engine.step():
                if output.request_id in request_ids:
                    if output.error is not None:
                        raise output.error
                    yield output


def load_engine(
    owner: str, model: str | PathLike[str], settings: Mapping[str, Any]
) -> tuple[ParallelEngine | None, Engine | ParallelEngine]:
    """(the engine over ranks if there are several, the engine). `owner`: the class that errors name."""
    engine, ranks = sort_out(owner, {"model": model, **settings}, EngineConfig, ParallelConfig)
    config, parallel = EngineConfig.from_dict(engine), ParallelConfig.from_dict(ranks)
    refuse_no_effect(config, parallel)
    config = config.replace(model=find_model(config.model, config.revision, config.offline))
    over_ranks = engine_over_ranks(config, parallel)
    return over_ranks, over_ranks or Engine.from_config(config)


def _refuse_both(params: object, sampling_params: object) -> None:
    """InvalidRequestError (params): one argument is given under both of its names."""
    if params is not None and sampling_params is not None:
        raise InvalidRequestError("params", "params and sampling_params are two names of one argument; give one")


def request_for(prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer, number: int) -> Request:
    """A request of this number. InvalidRequestError (prompts): what is no prompt."""
    return Request(f"llm-{number}", _ids_of(prompt, tokenizer), params, time.monotonic())


def _ids_of(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return token_ids("prompt_token_ids", prompt["prompt_token_ids"])
        if not isinstance(prompt.get("prompt"), str):
            found = ", ".join(map(str, prompt))
            raise InvalidRequestError("prompts", f"a prompt has a text as prompt, or prompt_token_ids; got {found}")
        prompt = prompt["prompt"]
    return tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) else token_ids("prompts", prompt)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, a mapping, or token ids) as a list of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError("prompts", f"prompts takes texts, token ids or dicts, got {type(prompts).__name__}")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def conversation_list(messages: Any) -> Sequence[Sequence[Message]]:
    """One conversation as a list of one, or several. InvalidRequestError for anything else."""
    if isinstance(messages, Sequence) and not isinstance(messages, str | bytes):
        if all(isinstance(item, Mapping) for item in messages):
            return [messages]
        if all(isinstance(item, Sequence) and not isinstance(item, str | bytes) for item in messages):
            return messages
    raise InvalidRequestError("messages", "messages takes a list of {role, content} dicts, or a list of such lists")


def empty_result(request: Request) -> RequestResult:
    """A result without any output."""
    return RequestResult(request.request_id, request.prompt_token_ids, [Completion(i) for i in range(request.params.n)])


def params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    """One for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(item, SamplingParams) for item in params):
        raise InvalidRequestError("params", f"params takes SamplingParams, one or one per prompt, got {params!r}")
    if len(params) != count:
        raise InvalidRequestError(
            "params", f"{len(params)} sampling parameters for {count} prompts; give one or one each"
        )
    return params
