"""Puts forecasts of running sequences into an engine: for expert-aware batching, and to protect slots.

Where the settings and the model leave something to choose; otherwise nothing is installed and nothing costs. Knows the
settings and the parts; what they do is in moe_serve/batch_choice.py and moe_serve/slot_protection.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from expert_cache.policies.predicted import Predicted
from moe_serve.batch_choice import ExpertAware, choosing_pays
from moe_serve.slot_protection import SlotProtection
from moe_serve.usage_forecast import UsageForecast

if TYPE_CHECKING:
    from moe_serve.engine import Engine

TOKENS_AHEAD = 4.0
"""Horizon of slot protection: next-layer forecasts save few misses, some tokens' many (policies/predicted.py)."""
SLOT_DECAY = 0.9
"""For slots a longer memory than for batches: an expert is kept for more than the next token."""


def install(engine: Engine) -> None:
    """What `expert_aware_batching` and `moe_cache_policy` ask for."""
    _install_batching(engine)
    _install_protection(engine)


def _install_protection(engine: Engine) -> None:
    """Forecasts for the policy `predicted`."""
    if engine.config.moe_cache_policy != "predicted":
        return
    policy = engine.runner.eviction_policy()
    if not isinstance(policy, Predicted):
        return
    shape = engine.routing_shape()
    forecast = UsageForecast(shape, SLOT_DECAY)
    engine.listen_to_routes(forecast)
    num_layers = len(shape.layer_ids)
    engine.listen_to_routes(
        SlotProtection(policy, forecast, lambda: engine.scheduler.running, num_layers, TOKENS_AHEAD)
    )


def _install_batching(engine: Engine) -> None:
    """ExpertAware in the place of the scheduler's first come, first served."""
    config, spec = engine.config, engine.spec
    width = config.max_num_batched_seqs
    if config.expert_aware_batching == "off" or width is None or width >= config.max_num_seqs:
        return
    has_cache = engine.runner.resident_experts() is not None

    def resident() -> NDArray[np.bool_]:
        found = engine.runner.resident_experts()
        assert found is not None
        return found.ravel()

    def can_pay(step_width: int) -> bool:
        if config.expert_aware_batching == "on":
            return True
        return choosing_pays(spec.num_experts, spec.top_k, step_width, float(resident().mean()))

    if config.expert_aware_batching == "auto" and not (
        has_cache and choosing_pays(spec.num_experts, spec.top_k, width, resident_frac=0.0)
    ):
        return
    forecast = UsageForecast(engine.routing_shape())
    engine.listen_to_routes(forecast)
    engine.scheduler.choice = ExpertAware(forecast, config.max_skipped_steps, resident if has_cache else None, can_pay)
