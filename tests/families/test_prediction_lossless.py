"""Whatever is predicted, batched or protected, tokens are those of the resident model.

And logprobs bit for bit, except with expert-aware batching: another batch width may round the dense layers differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_cache.prefetch.advisors import Advice
from expert_cache.prefetch.audit import PrefetchAudit
from expert_cache.simulation.adaptive_quotas import AdaptiveQuotas
from moe_serve import LLM, SamplingParams
from moe_serve.errors import ConfigError
from moe_serve.expert_routes.route_recorder import RouteRecorder
from moe_serve.hf.checkpoint import checkpoint_fingerprint
from moe_serve.hf.routers import find_routers
from predictors import files
from predictors.methods import find_method, method_names
from predictors.predictor import FUTURE, Training
from predictors.shape import MoELayer

from .references import NEW_TOKENS, Reference
from .serving import host_managed, load, runner_of

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]
WITH_LOGPROBS = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=3)
NARROW = {"expert_aware_batching": "on", "max_num_batched_seqs": 2, "max_skipped_steps": 4}
RANDOM = {"moe_prefetch": "affinity"}


def bits(llm: LLM, ref: Reference) -> list[tuple[Any, Any]]:
    results = llm.generate(ref.prompts, WITH_LOGPROBS)
    llm.engine.check_integrity()
    return [(r.completions[0].token_ids, r.completions[0].logprobs) for r in results]


class AtRandom:
    """Expects any experts in any layer."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = num_layers, num_experts
        self._rng = np.random.default_rng(0)

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> list[Advice]:
        later = MoELayer(int(self._rng.integers(0, self._shape[0])))
        some = tuple(self._rng.permutation(self._shape[1])[:3].tolist())
        return [Advice(later, some, (1.0,) * len(some))]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"moe_prefetch": "next-gate"}, id="next_gate"),
        pytest.param(RANDOM, id="random"),
        pytest.param(NARROW, id="batching"),
        pytest.param({**NARROW, "moe_prefetch": "next-gate", "moe_cache_policy": "predicted"}, id="all_together"),
        pytest.param({"moe_cache_pool": "adaptive", "moe_cache_policy": "predicted"}, id="protected-adaptive_quotas"),
    ],
)
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v2"])
def test_same_bits(case: str, settings: dict[str, Any], checkpoint: Checkpoint, reference: References) -> None:
    ref = reference(case)
    resident = bits(load(checkpoint(case), moe_cache_mib=0), ref)
    llm = load(checkpoint(case), moe_cache_mib=4, **settings)
    experts = host_managed(llm)
    cache = experts.cache
    cache._most_transit = 2  # room to bring experts ahead of time
    cache.resize(cache.store.num_total // 2)
    if cache.observers.quotas is not None:  # a window of a few steps, so that it comes to changes
        cache.observers.quotas = AdaptiveQuotas(len(cache.store.layers), cache.store.num_experts, window_steps=6)
    if settings is RANDOM:
        experts.advisor = AtRandom(len(cache.store.layers), cache.store.num_experts)
    assert (experts.audit is not None) == ("moe_prefetch" in settings)
    for _ in range(3):
        llm.engine.pool.clear_cache()
        got = bits(llm, ref)
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in resident]
        assert got == resident or "max_num_batched_seqs" in settings
    cache.check_integrity()
    assert tuple(tuple(t) for t, _ in resident) == ref.outputs
    assert cache.counters.num_misses > 0
    llm.close()


@pytest.mark.parametrize("method", [m for m in method_names() if FUTURE not in find_method(m).needs])
def test_same_bits_with_every_trained_predictor(
    method: str, checkpoint: Checkpoint, reference: References, tmp_path: Path
) -> None:
    """Trained on the routes of another run; the audit is off, so that all of its advice is followed."""
    folder, ref = checkpoint("mixtral"), reference("mixtral")
    resident = load(folder, moe_cache_mib=0, enable_prefix_caching=False)
    recorder = RouteRecorder(resident.engine.routing_shape(), 1000, token_ids=True)
    resident.engine.observe_routes(recorder)
    expected = bits(resident, ref)
    resident.engine.observe_routes(recorder, wanted=False)
    spec = resident.engine.spec
    routers = find_routers(runner_of(resident).model, spec.num_experts, spec.hidden_size)
    training = Training(recorder.trace({}), [(w.detach(), b) for w, b in routers])
    path = tmp_path / "predictor"
    files.save(path, method, find_method(method).fit(training), training.shape, checkpoint_fingerprint(str(folder)))
    used = {"moe_prefetch": "predictor", "moe_prefetch_audit": False, "moe_cache_policy": "predicted"}
    llm = load(folder, moe_cache_mib=4, moe_predictor=str(path), **used)
    cache = host_managed(llm).cache
    cache._most_transit = 2  # room to bring experts ahead of time
    cache.resize(cache.store.num_total // 2)
    llm.engine.pool.clear_cache()
    assert bits(llm, ref) == expected
    assert cache.counters.prefetch_bytes.sum() + cache.counters.late_prefetches.sum() > 0
    llm.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_prefetch": "predictor"}, "--moe-prefetch predictor needs --moe-predictor"),
        ({"moe_prefetch": "predictor", "moe_predictor": "/nowhere"}, "--moe-predictor: /nowhere: does not exist"),
        ({"moe_predictor": "/nowhere"}, "--moe-predictor needs --moe-prefetch predictor or"),
    ],
)
def test_no_predictor_is_refused(settings: dict[str, Any], message: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=message):
        load(checkpoint("mixtral"), moe_cache_mib=1, **settings)


def test_advice_is_held_against_what_was_used(checkpoint: Checkpoint, reference: References) -> None:
    llm = load(checkpoint("mixtral"), moe_cache_mib=4, moe_prefetch="next-gate")
    experts = host_managed(llm)
    assert isinstance(experts.audit, PrefetchAudit)
    bits(llm, reference("mixtral"))
    predicted_used = experts.usage.predictions()["predicted_used"]
    assert predicted_used[0] == 0
    assert (predicted_used[1:] > 0).all()
    llm.close()


def test_narrow_steps_are_narrow(checkpoint: Checkpoint, reference: References) -> None:
    llm = load(checkpoint("mixtral"), moe_cache_mib=4, **NARROW)
    widths: list[int] = []
    schedule = llm.engine.scheduler.schedule

    def watched() -> Any:
        plan = schedule()
        widths.append(sum(item.start >= item.seq.num_prompt for item in plan.scheduled))
        return plan

    llm.engine.scheduler.schedule = watched  # type: ignore[method-assign]
    bits(llm, reference("mixtral"))
    assert max(widths) == 2
    llm.close()
