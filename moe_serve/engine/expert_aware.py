"""Puts expert-aware batching into an engine, where the settings and the model leave something to choose.

Otherwise nothing is installed and nothing costs. Knows the settings and the parts; the choice itself is
moe_serve/scheduling/batch_choice.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_serve.expert_routes.usage_forecast import UsageForecast
from moe_serve.scheduling.batch_choice import ExpertAware, choosing_pays

if TYPE_CHECKING:
    from moe_serve.engine.engine import Engine


def install(engine: Engine) -> None:
    """ExpertAware in the place of the scheduler's first come, first served if `expert_aware_batching` says so."""
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
