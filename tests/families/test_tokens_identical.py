"""The promise of the engine: in fp32, greedy tokens are those of transformers' `generate`.

For every family, whatever the batch, the chunking, the page size, the prefix cache, preemption and
the room for experts. A difference here is a wrong token for a user.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .references import PROMPT_LENGTHS, SHARED, Reference
from .serving import StepLog, greedy, host_managed, load, runner_of, tokens
from .tiny_configs import CASES, POSITIONS

pytestmark = pytest.mark.parametrize("case", CASES)

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]


@pytest.mark.spanning
def test_one_prompt_at_a_time(case: str, checkpoint: Checkpoint, reference: References) -> None:
    ref = reference(case)
    llm = load(checkpoint(case), enable_prefix_caching=False)
    assert tuple(tokens(greedy(llm, [p]))[0] for p in ref.prompts) == ref.outputs


BLOCKS = {"state_block_size": 32}
"""Where recurrent layers' states can be kept; other models have no use for it."""
WHOLE_PROMPTS: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": POSITIONS}


spanning = pytest.mark.spanning


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**WHOLE_PROMPTS, "enable_prefix_caching": False}, id="whole_prompts", marks=spanning),
        pytest.param({**WHOLE_PROMPTS, "block_size": 4}, id="whole_prompts-pages_of_4", marks=spanning),
        pytest.param({"max_num_batched_tokens": 16, "enable_prefix_caching": False}, id="chunks_of_16", marks=spanning),
        pytest.param({"max_num_batched_tokens": 13, "block_size": 4}, id="chunks_of_13-pages_of_4"),
    ],
)
def test_mixed_batch(case: str, settings: dict[str, Any], checkpoint: Checkpoint, reference: References) -> None:
    ref = reference(case)
    llm = load(checkpoint(case), **settings)
    log = StepLog(llm)
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs
    longest = sum(PROMPT_LENGTHS) if "enable_chunked_prefill" in settings else settings["max_num_batched_tokens"]
    assert log.most_prompt_tokens <= longest
    assert log.num_preemptions == 0


@pytest.mark.spanning
@pytest.mark.parametrize("page_size", [4, 16])
def test_prefix_cache(case: str, page_size: int, checkpoint: Checkpoint, reference: References) -> None:
    """First prompts that share a prefix with one that came before, then the same prompts again."""
    ref = reference(case)
    llm = load(checkpoint(case), block_size=page_size, **BLOCKS)
    results = greedy(llm, ref.prompts[:4]) + greedy(llm, ref.prompts[4:])
    assert tokens(results) == ref.outputs
    has_states = bool(runner_of(llm).loaded.state_shapes)
    if not has_states:
        assert [r.num_cached_tokens for r in results] == [0, 0, 0, 0, SHARED, SHARED]
    again = greedy(llm, ref.prompts)
    assert tokens(again) == ref.outputs
    whole_pages = [(n - 1) // page_size * page_size for n in PROMPT_LENGTHS]
    assert [r.num_cached_tokens for r in again] == ([0, 0, 0, 32, 32, 64] if has_states else whole_pages)


@pytest.mark.parametrize(
    "prefix_caching", [pytest.param(False, id="recomputed", marks=spanning), pytest.param(True, id="prefix_cache")]
)
def test_preemption(case: str, prefix_caching: bool, checkpoint: Checkpoint, reference: References) -> None:
    """24 pages of 4 hold the longest sequence (82 tokens) but not the six together (251)."""
    ref = reference(case)
    llm = load(checkpoint(case), num_kv_pages=24, block_size=4, enable_prefix_caching=prefix_caching, **BLOCKS)
    log = StepLog(llm)
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs
    assert log.num_preemptions > 0


@pytest.mark.spanning
@pytest.mark.parametrize("room", ["mapped", "for_half", "for_all"])
def test_room_for_experts(case: str, room: str, checkpoint: Checkpoint, reference: References) -> None:
    """Run twice: with room for all, the second run finds every expert ready; with room for half, it does not."""
    ref = reference(case)
    llm = load(checkpoint(case), moe_cache_mib=0 if room == "mapped" else 64)
    if room == "for_half":
        cache = host_managed(llm).cache
        cache.resize(cache.store.num_total // 2)
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs
    log = StepLog(llm)
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs
    assert (log.expert_misses > 0) == (room == "for_half")
    assert log.expert_hits > 0
    llm.close()
