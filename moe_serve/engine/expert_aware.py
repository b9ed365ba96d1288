"""Expert-aware batching, where the settings and the model leave something to choose.

Otherwise there is nothing to install and nothing costs. Knows the settings and the parts; the choice itself is
moe_serve/scheduling/batch_choice.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moe_serve.config import EngineConfig
from moe_serve.scheduling.batch_choice import ExpertAware, Forecasts, choosing_pays
from moe_serve.spec import ModelSpec

Resident = Callable[[], NDArray[np.bool_] | None]
"""[L, E] experts in slots now; None where no expert ever leaves."""


def choice_for(
    config: EngineConfig, spec: ModelSpec, resident_experts: Resident, forecasts: Forecasts
) -> ExpertAware | None:
    """What takes the place of the scheduler's first come, first served, if `expert_aware_batching` says so."""
    width = config.max_num_batched_seqs
    if config.expert_aware_batching == "off" or width is None or width >= config.max_num_seqs:
        return None
    has_cache = resident_experts() is not None

    def resident() -> NDArray[np.bool_]:
        found = resident_experts()
        assert found is not None
        return found.ravel()

    def can_pay(step_width: int) -> bool:
        if config.expert_aware_batching == "on":
            return True
        return choosing_pays(spec.num_experts, spec.top_k, step_width, float(resident().mean()))

    if config.expert_aware_batching == "auto" and not (
        has_cache and choosing_pays(spec.num_experts, spec.top_k, width, resident_frac=0.0)
    ):
        return None
    return ExpertAware(forecasts, config.max_skipped_steps, resident if has_cache else None, can_pay)
