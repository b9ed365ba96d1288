"""What a cache policy is: it watches which experts each step uses and says which are worth keeping.

The cache evicts the expert with the smallest keep value among those neither pinned nor in use, ties by index. It
calls `record` for an event before it asks what to evict for that event. An event is a layer's whole expert set in
one step: per-access bookkeeping would make the experts of one token look more recent than one another.

A policy knows numpy only; neither slots nor bytes nor devices. `record` and `keep_values` run once per layer and
step of a live engine: 20 us each, at E = 64, is the budget.

Shape alphabet: L MoE layers, E experts per layer, n distinct experts of one event.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]
Values = npt.NDArray[np.float64]


class Policy(Protocol):
    """The live side: one instance per model."""

    def record(self, layer: int, experts: Ints, counts: Ints, weights: Floats | None) -> None:
        """One event: `experts` [n] distinct and ascending, `counts` [n] tokens routed to each, `weights` [n] their
        router weights summed over those tokens, or None where the caller does not have them."""
        ...

    def keep_values(self, layer: int) -> Values:
        """[E] finite, not to be written to; higher = keep longer. Only the order within the layer matters."""
        ...

    def keep_values_all(self) -> Values:
        """[L, E] finite, comparable across layers: for one pool of slots that all layers share."""
        ...


class PolicyMaker(Protocol):
    """What a policy's file exports as `POLICY`: its class."""

    @property
    def needs(self) -> str:
        """What it is pointless without: "popularity", "forecast" (from a predictor), or "" for nothing."""
        ...

    def __call__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> Policy:
        """`popularity` [L, E]: uses per token on an earlier trace, where there is one; a policy may start from it."""
        ...
