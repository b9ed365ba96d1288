"""The offload mode through the whole engine: tokens and logprobs are bit for bit those of the resident one.

Capacities from one slot in all (fewer than any step needs) over one per layer to everything; prefetch
off, on, and driven by a predictor that is always wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_cache.host_managed.cache import ExpertCache
from expert_cache.prefetch.advisors import Advice
from expert_cache.storage import expert_file
from moe_serve import LLM, SamplingParams
from moe_serve.errors import CheckpointError, ConfigError, InvalidRequestError, MoEServeError
from moe_serve.hf.checkpoint import checkpoint_fingerprint
from predictors.shape import MoELayer
from predictors.trace import RoutingTrace

from .references import NEW_TOKENS, Reference
from .serving import host_managed, load, runner_of
from .tiny_configs import CASES

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2")
WITH_LOGPROBS = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=3)
Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]
Bits = list[tuple[Any, Any]]


def bits(llm: LLM, prompts: Sequence[Sequence[int]]) -> Bits:
    results = llm.generate(prompts, WITH_LOGPROBS)
    return [(r.completions[0].token_ids, r.completions[0].logprobs) for r in results]


def cache_of(llm: LLM) -> ExpertCache:
    return host_managed(llm).cache


class AlwaysWrong:
    """Expects in every layer exactly what this layer's router did not choose."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = num_layers, num_experts

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> list[Advice]:
        others = tuple(e for e in range(self._shape[1]) if e not in experts)
        return [Advice(MoELayer(i), others, (1.0,) * len(others)) for i in range(self._shape[0])]


def settings_of(capacity: str) -> dict[str, Any]:
    return {"moe_cache_mib": 4, "moe_cache_pool": "per-layer" if capacity == "one_per_layer" else "global"}


@pytest.mark.parametrize("prefetch", ["off", "next-gate", "affinity", "wrong"])
@pytest.mark.parametrize("capacity", ["one_slot", "one_per_layer", "a_third", "everything"])
@pytest.mark.parametrize("case", FAMILIES)
def test_same_bits(case: str, capacity: str, prefetch: str, checkpoint: Checkpoint, reference: References) -> None:
    assert case in CASES
    ref = reference(case)
    resident = bits(load(checkpoint(case), moe_cache_mib=0), ref.prompts)
    llm = load(checkpoint(case), **settings_of(capacity), moe_prefetch="off" if prefetch == "wrong" else prefetch)
    cache = cache_of(llm)
    num_layers, total = len(cache.store.layers), cache.store.num_total
    cache.resize({"one_slot": 1, "one_per_layer": num_layers, "a_third": total // 3, "everything": total}[capacity])
    if prefetch == "wrong":
        host_managed(llm).advisor = AlwaysWrong(num_layers, cache.store.num_experts)
    for _ in range(2):
        llm.engine.pool.clear_cache()
        assert bits(llm, ref.prompts) == resident
    cache.check_integrity()
    assert tuple(tuple(t) for t, _ in resident) == ref.outputs
    assert cache.counters.num_misses > 0
    llm.close()


@pytest.mark.parametrize("case", FAMILIES)
def test_an_expert_file_gives_the_same_bits(
    case: str, checkpoint: Checkpoint, reference: References, tmp_path: Path
) -> None:
    """The file holds rows where GPT-OSS holds columns, so its last bits may differ; tokens may not."""
    ref, folder = reference(case), str(checkpoint(case))
    plain = LLM(folder, moe_cache_mib=0, max_model_len=256, num_kv_pages=128, dtype="float32")
    path = tmp_path / "experts"
    expert_file.write(runner_of(plain).loaded.store, path, checkpoint_fingerprint(folder), lambda: None)
    packed = LLM(
        folder, moe_cache_mib=1, moe_expert_file=str(path), max_model_len=256, num_kv_pages=128, dtype="float32"
    )
    got, want = bits(packed, ref.prompts), bits(plain, ref.prompts)
    assert [t for t, _ in got] == [t for t, _ in want]
    assert case == "gpt_oss" or got == want
    assert len(cache_of(packed).store.reads(cache_of(packed).store.layers[-1], 1)) == 1
    packed.close()


def test_another_checkpoints_expert_file_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "experts"
    llm = load(checkpoint("mixtral"))
    expert_file.write(runner_of(llm).loaded.store, path, "another", lambda: None)
    with pytest.raises(CheckpointError, match=r"was not made from the checkpoint.*moe-serve pack"):
        LLM(str(checkpoint("mixtral")), moe_expert_file=str(path))
    path.write_bytes(b"nonsense that is no expert file")
    with pytest.raises(CheckpointError, match="--moe-expert-file"):
        LLM(str(checkpoint("mixtral")), moe_expert_file=str(path))


def test_a_budget_that_holds_no_expert_is_refused(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.resolve.MIB", 1)
    with pytest.raises(ConfigError, match=r"--moe-cache-mib 5 does not hold a single expert; give at least \d+"):
        load(checkpoint("mixtral"), moe_cache_mib=5)


def test_per_layer_pools_want_a_slot_for_each_layer(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.resolve.MIB", 1)
    monkeypatch.setattr("expert_cache.simulation.capacity.MIB", 1)
    slot_bytes = cache_of(load(checkpoint("mixtral"), moe_cache_mib=10**6)).store.slot_bytes
    with pytest.raises(ConfigError, match=r"--moe-cache-pool per-layer.*holds 2 experts.*or choose global"):
        load(checkpoint("mixtral"), moe_cache_mib=2 * slot_bytes, moe_cache_pool="per-layer")


def test_resizing_between_requests(checkpoint: Checkpoint, reference: References) -> None:
    ref = reference("mixtral")
    llm = load(checkpoint("mixtral"), moe_cache_mib=4)
    want = bits(llm, ref.prompts)
    llm.engine.resize_expert_cache(1)
    assert cache_of(llm).used_bytes <= 1 << 20
    llm.engine.pool.clear_cache()
    assert bits(llm, ref.prompts) == want
    with pytest.raises(InvalidRequestError, match="without an expert cache"):
        load(checkpoint("mixtral"), moe_cache_mib=0).engine.resize_expert_cache(1)


def test_short_memory_shrinks_the_cache_instead_of_crashing(checkpoint: Checkpoint, reference: References) -> None:
    ref = reference("mixtral")
    llm = load(checkpoint("mixtral"), moe_cache_mib=4)
    want = bits(llm, ref.prompts)
    cache, guard = cache_of(llm), host_managed(llm)._guard
    assert guard is not None
    guard._free_bytes = lambda: 0
    guard._next_check = 0.0
    llm.engine.pool.clear_cache()
    assert bits(llm, ref.prompts) == want
    assert cache.num_slots < cache.store.num_total
    guard._free_bytes = lambda: 1 << 40
    guard._next_check = 0.0
    llm.engine.pool.clear_cache()
    assert bits(llm, ref.prompts) == want
    assert cache.num_slots == guard.wanted_slots


def test_a_damaged_expert_ends_the_requests_that_need_it(
    checkpoint: Checkpoint, reference: References, tmp_path: Path
) -> None:
    """Through the whole engine: an error naming tensor and file, and a good request served after it."""
    ref, folder = reference("mixtral"), str(checkpoint("mixtral"))
    path = tmp_path / "experts"
    store = runner_of(load(checkpoint("mixtral"))).loaded.store
    expert_file.write(store, path, checkpoint_fingerprint(folder), lambda: None)
    read = expert_file.read(path)[0].reads(store.layers[1], 2)[0]
    with path.open("r+b") as stream:
        stream.seek(read.offset + 64)
        stream.write(os.urandom(64))
    llm = LLM(folder, moe_cache_mib=4, moe_expert_file=str(path), max_model_len=256, num_kv_pages=128, dtype="float32")
    with pytest.raises(MoEServeError, match=rf"layer {store.layers[1]} expert 2.*checksum.*{path}.*experts\.2\.gate"):
        llm.generate(ref.prompts, WITH_LOGPROBS)
    cache_of(llm).check_integrity()
    llm.engine.check_integrity()
    llm.close()


def trace_for(num_layers: int, num_experts: int, folder: Path) -> str:
    ids = np.random.default_rng(0).integers(0, num_experts, (40, num_layers, 1)).astype(np.uint8)
    trace = RoutingTrace(ids, np.array([0, 40]), np.arange(num_layers, dtype=np.int32), num_experts)
    trace.save(folder / "trace.npz")
    return str(folder / "trace.npz")


def test_quotas_and_popularity_come_from_a_profile(
    checkpoint: Checkpoint, reference: References, tmp_path: Path
) -> None:
    store = cache_of(load(checkpoint("mixtral"), moe_cache_mib=4)).store
    profile = trace_for(len(store.layers), store.num_experts, tmp_path)
    settings = {"moe_cache_pool": "quota", "moe_cache_policy": "static", "moe_cache_profile": profile}
    llm = load(checkpoint("mixtral"), moe_cache_mib=1, **settings)
    quotas = cache_of(llm).table.allowed.quotas
    assert quotas is not None
    assert sum(quotas) + cache_of(llm).table.num_transit == (1 << 20) // store.slot_bytes
    assert tuple(tuple(t) for t, _ in bits(llm, reference("mixtral").prompts)) == reference("mixtral").outputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_cache_pool": "quota"}, "--moe-cache-pool quota needs --moe-cache-profile"),
        ({"moe_cache_policy": "static"}, "--moe-cache-policy static needs --moe-cache-profile"),
        ({"moe_cache_shadow": "lru,best"}, "--moe-cache-shadow: policy 'best' is not one of affinity"),
        ({"moe_cache_shadow": "static"}, "--moe-cache-shadow: static needs a popularity"),
        ({"moe_cache_profile": "/nowhere.npz"}, "--moe-cache-profile: .*nowhere"),
    ],
)
def test_settings_without_their_profile_are_refused(
    settings: dict[str, Any], message: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(checkpoint("mixtral"), moe_cache_mib=1, **settings)


def test_a_profile_of_another_model_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--moe-cache-profile.*7 layers of 3 experts; this model has"):
        load(checkpoint("mixtral"), moe_cache_mib=1, moe_cache_profile=trace_for(7, 3, tmp_path))
