"""A request's tokens and log-probabilities do not depend on what else runs: bit for bit, in every dtype, on a CPU.

Each request runs alone first. Then all run together, in chunks of several sizes, after their prompts are cached, with
so few KV pages that some are preempted, and with an expert cache that changes its size. A few families do all of this;
`test_every_family` holds each tiny model to the most of it, so a family that is added is held to it too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moe_serve
from moe_serve import LLM, SamplingParams
from moe_serve_kernels.cpu import library

from .serving import StepLog, host_managed, load
from .tiny_configs import CASES

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

Checkpoint = Callable[[str], Path]
Answer = tuple[tuple[int, ...], tuple[tuple[float, tuple[tuple[int, float], ...]], ...]]
"""Tokens; for each its log-probability and the best others'."""
DEMO = Path(moe_serve.__file__).parent / "demo" / "model"
MODELS = ("demo", "deepseek_v2", "gpt_oss")
DTYPES = ("float32", "bfloat16")
QUICK = (("demo", "float32"), ("deepseek_v2", "bfloat16"), ("gpt_oss", "float32"))
SIDES = [
    pytest.param((name, dtype), id=f"{name}-{dtype}", marks=[] if (name, dtype) in QUICK else [pytest.mark.slow])
    for name in MODELS
    for dtype in DTYPES
]
QUICK_FAMILIES = ("phimoe", "deepseek_v32", "qwen3_next")
"""Plain attention, chosen tokens, and a recurrence."""
FAMILIES = [
    pytest.param((name, dtype), id=f"{name}-{dtype}", marks=[] if quick else [pytest.mark.slow])
    for i, name in enumerate(CASES)
    for dtype in DTYPES
    for quick in [name in QUICK_FAMILIES and DTYPES[i % 2] == dtype]
]
STATE_BLOCK = 16
"""Recurrent layers give a prompt the same bits in any chunks if these end with blocks."""
NUM_REQUESTS = int(os.environ.get("MOE_SERVE_TEST_REQUESTS", "32"))


def folder_of(name: str, checkpoint: Checkpoint) -> Path:
    return DEMO if name == "demo" else checkpoint(name)


class Model(NamedTuple):
    folder: Path
    dtype: str


def start(model: Model, **settings: Any) -> LLM:
    fixed = {"dtype": model.dtype, "max_model_len": 160, "max_num_seqs": 40, "num_kv_pages": 400}
    return load(model.folder, **{**fixed, **settings})


def prompts_of() -> list[list[int]]:
    """Of 1 to 80 tokens; every third begins like the one before."""
    rng = random.Random(5)
    prompts: list[list[int]] = []
    for i in range(NUM_REQUESTS):
        new = [rng.randrange(3, 250) for _ in range(rng.choice((1, 2, 5, 9, 17, 33, 48, 80)))]
        prompts.append(new if i % 3 else [*(prompts[-1][:32] if prompts else []), *new])
    return prompts


def params_of(count: int) -> list[SamplingParams]:
    """Greedy, plainly random, and with each way to cut off what is unlikely."""
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1}, {"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.05}]
    ways.append({"top_k": 20, "top_p": 0.7, "temperature": 0.8})
    return [
        SamplingParams(seed=i, max_tokens=10, ignore_eos=True, logprobs=(2, 5)[i % 2], **ways[i % len(ways)])
        for i in range(count)
    ]


def run(llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Answer]:
    answers = []
    for result in llm.generate(prompts, params):
        completion = result.completions[0]
        assert completion.logprobs is not None
        scored = tuple((entry.logprob, entry.top) for entry in completion.logprobs)
        answers.append((tuple(completion.token_ids), scored))
    return answers


@pytest.fixture(scope="module", params=SIDES)
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Model:
    name, dtype = request.param
    return Model(folder_of(name, checkpoint), dtype)


Requests = tuple[list[list[int]], list[SamplingParams], list[Answer]]


@pytest.fixture(scope="module")
def requests(model: Model) -> Requests:
    """Prompts, parameters, and what each request gets when it runs alone."""
    prompts, params = prompts_of(), params_of(NUM_REQUESTS)
    llm = start(model, enable_prefix_caching=False)
    alone = [run(llm, [prompt], [own])[0] for prompt, own in zip(prompts, params, strict=True)]
    return prompts, params, alone


def test_among_others(model: Model, requests: Requests) -> None:
    prompts, params, alone = requests
    assert run(start(model, enable_prefix_caching=False), prompts, params) == alone


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_in_chunks(chunk: int, model: Model, requests: Requests) -> None:
    prompts, params, alone = requests
    count = 6 if chunk == 1 else len(prompts)
    llm = start(model, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 40))
    assert run(llm, prompts[:count], params[:count]) == alone[:count]


def test_after_a_prefix_hit(model: Model, requests: Requests) -> None:
    prompts, params, alone = requests
    llm = start(model)
    assert run(llm, prompts, params) == alone
    again = llm.generate(prompts, params)
    assert sum(result.num_cached_tokens for result in again) > 0
    assert [tuple(result.completions[0].token_ids) for result in again] == [tokens for tokens, _ in alone]
    assert run(llm, prompts, params) == alone


def test_when_preempted(model: Model, requests: Requests) -> None:
    prompts, params, alone = requests
    llm = start(model, num_kv_pages=16, enable_prefix_caching=False)
    log = StepLog(llm)
    assert run(llm, prompts, params) == alone
    assert log.num_preemptions > 0


def test_while_the_expert_cache_is_resized(model: Model, requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params, alone = requests
    llm = start(model, moe_cache_mib=64, moe_cache_manager="host")
    cache = host_managed(llm).cache
    sizes, step = (cache.arena.num_slots, 3, 1 + cache.store.num_total // 2), llm.engine.step
    count = 0

    def resizing() -> Any:
        nonlocal count
        cache.resize(max(sizes[count % 3], 1))
        count += 1
        return step()

    monkeypatch.setattr(llm.engine, "step", resizing)
    assert run(llm, prompts, params) == alone
    assert count >= 10
    llm.close()


def test_scored_prompts(model: Model) -> None:
    """Log-probabilities of prompts: one prompt alone, among others and in chunks."""
    prompts = [prompt for prompt in prompts_of() if len(prompt) > 1][:12]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)

    def scores(llm: LLM, several: Sequence[Sequence[int]]) -> list[Any]:
        return [result.prompt_logprobs for result in llm.generate(several, params)]

    llm = start(model, enable_prefix_caching=False)
    alone = [scores(llm, [prompt])[0] for prompt in prompts]
    assert scores(llm, prompts) == alone
    assert scores(start(model, enable_prefix_caching=False, max_num_batched_tokens=7, max_num_seqs=7), prompts) == alone


def few_requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Longer than the tiny models' windows and choices of tokens, and as short as one token; two begin alike."""
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 250) for _ in range(count)] for count in (1, 2, 9, 20, 37, 52)]
    prompts.append([*prompts[-1][:32], 5, 6, 7])
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=5, ignore_eos=True, logprobs=3)
        for i in range(len(prompts))
    ]
    return prompts, params


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: tuple[str, str], checkpoint: Checkpoint) -> None:
    name, dtype = family
    prompts, params = few_requests()
    settings: dict[str, Any] = {"state_block_size": STATE_BLOCK, "max_num_batched_tokens": 64}
    model = Model(folder_of(name, checkpoint), dtype)
    llm = start(model, enable_prefix_caching=False, **settings)
    alone = [run(llm, [prompt], [own])[0] for prompt, own in zip(prompts, params, strict=True)]
    assert run(llm, prompts, params) == alone
    assert (
        run(start(model, enable_prefix_caching=False, **{**settings, "max_num_batched_tokens": 23}), prompts, params)
        == alone
    )
    llm = start(model, **settings, block_size=4, num_kv_pages=22)
    log = StepLog(llm)
    assert run(llm, prompts, params) == alone
    assert log.num_preemptions > 0
    assert run(llm, prompts[-1:], params[-1:]) == alone[-1:]
