"""How many of a budget's slots each layer gets: the split with the most LRU hits on an earlier trace.

LRU keeps the c most recently used experts for every c, so one pass gives the hits of every capacity: a use hits with c
slots if fewer than c experts were used since (Mattson's stack distances, 1970). Layers do not compete for anything
but slots, so dynamic programming over layers finds the best split exactly (AdapMoE divides a cache in this way).

Shape alphabet: L layers, E experts per layer, B slots in total.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import Events

Hits = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def quota_slots(events: Events, total: int, min_slots: int = 1) -> Capacity:
    """The best split of `total` slots over the layers, each between `min_slots` and E.

    Raises ValueError where that many slots cannot be given out.
    """
    if not min_slots * events.num_layers <= total <= events.num_layers * events.num_experts:
        raise ValueError(
            f"total is {total}; for {events.num_layers} layers it lies between {min_slots * events.num_layers} "
            f"and {events.num_layers * events.num_experts} slots"
        )
    return Capacity.per_layer(best_split(lru_hit_curves(events), total, min_slots))


def lru_hit_curves(events: Events) -> npt.NDArray[np.int64]:
    """[L, E+1]: LRU's hits in each layer with 0..E slots. Exact where no event has more experts than slots."""
    order, bounds = events.uses_by_step()
    cells, layers = events.cell_of_use()[order], events.layer_of_use()[order]
    recency = np.full((events.num_layers, events.num_experts), -1)
    distances = np.full(len(order), events.num_experts)
    for step, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        now = cells[start:end]
        own = recency.reshape(-1)[now]
        newer = np.count_nonzero(recency[layers[start:end]] > own[:, None], axis=1)
        distances[start:end] = np.where(own < 0, events.num_experts, newer)
        recency.reshape(-1)[now] = step * events.num_experts + now % events.num_experts
    width = events.num_experts + 1
    at_distance = np.bincount(layers * width + distances, minlength=events.num_layers * width)
    hits = np.zeros((events.num_layers, width), dtype=np.int64)
    hits[:, 1:] = at_distance.reshape(-1, width)[:, :-1].cumsum(axis=1)
    return hits


def best_split(hits: Hits, total: int, min_slots: int = 1) -> npt.NDArray[np.int64]:
    """[L] slots that add up to `total` and to the most hits; hits [L, E+1] by layer and slots."""
    num_layers, most = hits.shape[0], hits.shape[1] - 1
    best = np.full(total + 1, -np.inf)
    best[0] = 0
    taken = np.zeros((num_layers, total + 1), dtype=np.int64)
    for layer in range(num_layers):
        best, taken[layer] = _with_layer(best, hits[layer], min_slots, most)
    quotas = np.zeros(num_layers, dtype=np.int64)
    for layer in reversed(range(num_layers)):
        quotas[layer] = taken[layer, total]
        total -= int(quotas[layer])
    return quotas


def _with_layer(
    best: npt.NDArray[np.float64], hits: Hits, least: int, most: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Best hits [B+1] with one more layer, and the slots it takes for each budget."""
    improved = np.full_like(best, -np.inf)
    taken = np.zeros(len(best), dtype=np.int64)
    for slots in range(least, min(most, len(best) - 1) + 1):
        candidate = best[: len(best) - slots] + hits[slots]
        better = candidate > improved[slots:]
        improved[slots:][better] = candidate[better]
        taken[slots:][better] = slots
    return improved, taken
