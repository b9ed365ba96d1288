"""Quotas that follow the traffic: more slots where they save misses, no change where nothing is to be gained."""

from __future__ import annotations

import numpy as np

from expert_cache.simulation.adaptive_quotas import AdaptiveQuotas
from expert_cache.simulation.quotas import best_split, lru_hit_curves

LAYERS, EXPERTS, STEPS = 3, 16, 64


def feed(quotas: AdaptiveQuotas, working_sets: tuple[int, ...], rng: np.random.Generator) -> None:
    """A window in which layer i uses 2 of its first `working_sets[i]` experts per step."""
    for _ in range(STEPS):
        for layer, size in enumerate(working_sets):
            quotas.add(layer, np.sort(rng.choice(size, 2, replace=False)))


def test_slots_go_to_the_layer_with_the_larger_working_set() -> None:
    quotas, rng = AdaptiveQuotas(LAYERS, EXPERTS, STEPS), np.random.default_rng(0)
    feed(quotas, (3, 3, 12), rng)
    assert quotas.is_due
    assert quotas.proposal((6, 6, 6)) is None  # nothing to try it on yet
    feed(quotas, (3, 3, 12), rng)
    slots = quotas.proposal((6, 6, 6))
    assert slots is not None
    assert slots.quotas is not None
    assert slots.total == 18
    assert slots.quotas[2] == 12
    feed(quotas, (3, 3, 12), rng)
    assert quotas.proposal(slots.quotas) is None
    assert quotas.num_changes == 1


def test_layers_that_are_alike_keep_what_they_have() -> None:
    quotas, rng = AdaptiveQuotas(LAYERS, EXPERTS, STEPS), np.random.default_rng(1)
    for _ in range(6):
        feed(quotas, (12, 12, 12), rng)
        assert quotas.proposal((6, 6, 6)) is None


def test_a_split_that_does_not_hold_for_the_newest_window_is_not_taken() -> None:
    quotas, rng = AdaptiveQuotas(LAYERS, EXPERTS, STEPS), np.random.default_rng(2)
    feed(quotas, (3, 3, 12), rng)
    quotas.proposal((6, 6, 6))
    feed(quotas, (12, 3, 3), rng)
    assert quotas.proposal((6, 6, 6)) is None


def test_best_split_takes_weighted_curves() -> None:
    quotas, rng = AdaptiveQuotas(LAYERS, EXPERTS, STEPS), np.random.default_rng(3)
    feed(quotas, (3, 5, 12), rng)
    from expert_cache.simulation.events import events_from

    curves = lru_hit_curves(events_from(quotas._sets, LAYERS, EXPERTS))
    assert best_split(curves, 20).tolist() == best_split(0.5 * curves.astype(np.float64), 20).tolist()
