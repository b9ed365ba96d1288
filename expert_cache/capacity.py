"""Slots: how many experts a cache may hold, in one pool per layer or in one pool for all.

Shape alphabet: L layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
    def of_capacity(capacity_frac: float, num_layers: int, num_experts: int) -> Capacity:
        """Uniform pools that hold this fraction of the experts, at least one expert each."""
        return Capacity.uniform(max(1, round(capacity_frac * num_experts)), num_layers)
