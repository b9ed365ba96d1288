"""States of recurrent layers kept for later prompts: a hit gives the tokens and log-probabilities of a run without it.

To the bit, on one thread: each request runs alone in its steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_serve import LLM, SamplingParams
from moe_serve.errors import ConfigError
from moe_serve.hf.family import find
from moe_serve.llm import RequestResult
from moe_serve_kernels.cpu import library

from .serving import StepLog, load, runner_of
from .tiny_configs import CASES

Checkpoint = Callable[[str], Path]
RECURRENT = tuple(name for name, case in CASES.items() if find(case.model_type).recurrence is not None)
QUICK = ("qwen3_next", "lfm2_moe")
BLOCK = 32
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
Scored = tuple[tuple[int, ...], Any]

recurrent = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in RECURRENT]
)
needs_kernels = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")


def start(folder: Path, **settings: Any) -> LLM:
    return load(folder, **{"state_block_size": BLOCK, "max_num_batched_tokens": 512, **settings})


def prompts() -> list[list[int]]:
    """An agent's turns: each begins like the one before; the last leaves it in the middle."""
    rng = random.Random(3)
    first = [rng.randrange(3, 250) for _ in range(75)]
    longer = [*first, *(rng.randrange(3, 250) for _ in range(45))]
    return [first, longer, [*longer, 7, 8, 9], [*first[:70], *(rng.randrange(3, 250) for _ in range(20))], longer]


def one_by_one(llm: LLM, several: list[list[int]]) -> list[RequestResult]:
    found = [llm.generate([prompt], PARAMS)[0] for prompt in several]
    llm.engine.check_integrity()
    return found


def scored(results: list[RequestResult]) -> list[Scored]:
    completions = [result.completions[0] for result in results]
    return [(tuple(c.token_ids), [(e.logprob, e.top) for e in c.logprobs or ()]) for c in completions]


@needs_kernels
@recurrent
def test_a_hit_gives_the_bits_of_a_run_without_it(case: str, checkpoint: Checkpoint) -> None:
    cold = one_by_one(start(checkpoint(case), enable_prefix_caching=False), prompts())
    llm = start(checkpoint(case))
    log = StepLog(llm)
    warm = one_by_one(llm, prompts())
    assert [result.num_cached_tokens for result in warm] == [0, 64, 96, 64, 96]
    assert sum(step.num_restored_states for step in log.steps) == 4
    assert scored(warm) == scored(cold)


@needs_kernels
@recurrent
def test_chunks_change_no_bit(case: str, checkpoint: Checkpoint) -> None:
    whole = one_by_one(start(checkpoint(case), enable_prefix_caching=False), prompts()[:2])
    chunked = one_by_one(start(checkpoint(case), max_num_batched_tokens=50), prompts()[:2])
    assert scored(chunked) == scored(whole)


@recurrent
def test_a_preempted_sequence_goes_on_from_a_saved_state(case: str, checkpoint: Checkpoint) -> None:
    """Two prompts of 75 and 90 tokens and their answers need 44 pages of 4."""
    several = [prompts()[0], prompts()[3]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = [start(checkpoint(case)).generate([p], params)[0].completions[0].token_ids for p in several]
    llm = start(checkpoint(case), block_size=4, num_kv_pages=42)
    log = StepLog(llm)
    assert [r.completions[0].token_ids for r in llm.generate(several, params)] == alone
    assert log.num_preemptions > 0
    assert sum(step.num_restored_states for step in log.steps) > 0


def test_samples_of_one_prompt_share_its_state(checkpoint: Checkpoint) -> None:
    llm = start(checkpoint("lfm2_moe"))
    log = StepLog(llm)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, n=3)
    answers = [c.token_ids for c in llm.generate([prompts()[0]], params)[0].completions]
    assert answers[0] == answers[1] == answers[2]
    assert sum(step.num_restored_states for step in log.steps) == 2


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 2 * 8),
        ({"num_saved_states": 3}, 3),
        ({"state_cache_mib": 0}, 0),
        ({"enable_prefix_caching": False}, 0),
        ({"max_num_batched_tokens": 16, "state_block_size": None}, 0),
    ],
)
def test_rows_for_saved_states(settings: dict[str, Any], rows: int, checkpoint: Checkpoint) -> None:
    llm = start(checkpoint("lfm2_moe"), **settings)
    kept = next(iter(next(iter(runner_of(llm).states.layers.values())).values()))
    assert len(kept) == 8 + rows
    assert llm.engine.scheduler.limits.enable_prefix_caching == (rows > 0)


@pytest.mark.parametrize("tokens", [24, 1024])
def test_a_block_that_no_step_or_page_can_end_with_is_refused(tokens: int, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=rf"--state-block-size {tokens} must be a multiple of --page-size"):
        start(checkpoint("lfm2_moe"), state_block_size=tokens)
