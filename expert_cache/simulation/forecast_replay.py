"""Replay with a predictor: what its view on the coming tokens saves a cache that evicts by it.

One sequence at a time. Before each layer's event the policy `predicted` is given the predictor's `upcoming`, made
from what was routed until then; the cache then evicts by forecast instead of by habit.
"""

from __future__ import annotations

import numpy as np

from expert_cache.capacity import Capacity
from expert_cache.policies.predicted import Predicted
from expert_cache.simulation.replay import ReplayResult
from expert_cache.simulation.shadow import ShadowCache
from predictors.evaluation import run_streams, show
from predictors.predictor import Foresight, Predictor
from predictors.trace import RoutingTrace


def replay_forecasts(trace: RoutingTrace, predictor: Predictor, slots: Capacity) -> ReplayResult:
    """The trace through a cache that keeps what `predictor` expects. TypeError where it has no `upcoming`."""
    if not isinstance(predictor, Foresight):
        raise TypeError(f"{type(predictor).__name__} does not look beyond the current token")
    policy = Predicted(trace.num_layers, trace.num_experts)
    cache = ShadowCache(policy, slots, trace.num_layers, trace.num_experts)
    one_each = np.ones(trace.top_k, dtype=np.int64)
    for streams, rows in run_streams(predictor, trace, batch=1):
        for layer in range(trace.num_layers):
            show(predictor, trace, layer, streams, rows)
            policy.set_forecast(layer, predictor.upcoming(layer, streams)[0].astype(np.float64))
            cache.event(layer, np.sort(trace.ids[rows[0], layer].astype(np.int64)), one_each)
    hits, misses = np.array(cache.hits), np.array(cache.misses)
    return ReplayResult(hits, misses, trace.num_tokens, trace.num_tokens * trace.num_layers, slots.total)
