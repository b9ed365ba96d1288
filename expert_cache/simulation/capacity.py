"""Capacity: how many experts a cache may hold, in one pool per layer or in one pool for all.

One global pool lets busy layers take slots from quiet ones; a pool per layer keeps a layer's slots
from being swept by the layers after it. Sources disagree on which is better and traces decide
(`moe-serve replay`), so both exist, and per-layer quotas need not be equal (ExpertFlow's PLEC).
Knows numbers only.

Shape alphabet: L layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIB = 1 << 20


def slots_in(mib: int, slot_bytes: int, most: int) -> int:
    """Slots that a budget holds, `most` at most."""
    return min(mib * MIB // slot_bytes, most)


def least_mib(num_slots: int, slot_bytes: int) -> int:
    """The smallest budget, in MiB, that holds `num_slots` slots."""
    return -(-num_slots * slot_bytes // MIB)


@dataclass(frozen=True)
class Capacity:
    """`quotas` is None for one pool that all layers share."""

    total: int
    quotas: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.total < 1 or (self.quotas is not None and min(self.quotas) < 1):
            raise ValueError(f"{self} leaves a pool without a slot; give every pool at least 1")

    @staticmethod
    def per_layer(quotas: Sequence[int] | npt.NDArray[np.int64]) -> Capacity:
        """One pool per layer, [L] slots each."""
        numbers = tuple(int(quota) for quota in quotas)
        return Capacity(sum(numbers), numbers)

    @staticmethod
    def uniform(num_slots: int, num_layers: int) -> Capacity:
        """One pool of `num_slots` per layer."""
        return Capacity.per_layer([num_slots] * num_layers)

    @staticmethod
    def shared(total: int) -> Capacity:
        """One pool for all layers."""
        return Capacity(total)

    @staticmethod
    def of_frac(capacity_frac: float, num_layers: int, num_experts: int) -> Capacity:
        """Uniform pools that hold this fraction of the experts, at least one expert each."""
        return Capacity.uniform(max(1, round(capacity_frac * num_experts)), num_layers)


def global_pool(num_layers: int, num_experts: int, num_slots: int) -> Capacity:
    """One pool for all layers; slots beyond L * E are left out."""
    return Capacity.shared(max(1, min(num_slots, num_layers * num_experts)))


def per_layer(num_layers: int, num_experts: int, num_slots: int) -> Capacity:
    """Quotas as equal as can be; `num_slots` must be at least L."""
    return with_shares([1] * num_layers, num_experts, num_slots)


def with_shares(shares: Sequence[float], num_experts: int, num_slots: int) -> Capacity:
    """A pool per layer, slots in proportion to `shares` [L], each between 1 and E.

    Hands out one slot at a time to the layer that is furthest below its share, so the sum is exact.
    Example: shares (1, 1, 2), 8 experts, 8 slots -> (2, 2, 4).
    """
    num_layers = len(shares)
    assert num_slots >= num_layers
    quotas = [1] * num_layers
    for _ in range(min(num_slots, num_layers * num_experts) - num_layers):
        open_layers = [i for i in range(num_layers) if quotas[i] < num_experts]
        poorest = min(open_layers, key=lambda i: (quotas[i] + 0.5) / max(shares[i], 1e-12))
        quotas[poorest] += 1
    return Capacity.per_layer(quotas)


def resized(capacity: Capacity, num_layers: int, num_experts: int, num_slots: int) -> Capacity:
    """The same shares of another number of slots; one pool where there are fewer than layers."""
    if capacity.quotas is None or num_slots < num_layers:
        return global_pool(num_layers, num_experts, num_slots)
    return with_shares(capacity.quotas, num_experts, num_slots)
