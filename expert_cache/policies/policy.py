"""What a cache policy is: it watches which experts each step uses and says which are worth keeping.

The cache evicts the expert with the smallest keep value among those neither pinned nor in use, ties by index. It
calls `record` for an event before it asks what to evict for that event. An event is a layer's whole expert set in
one step: per-access bookkeeping would make the experts of one token look more recent than one another.

Laws. tests/expert_cache/test_policies.py checks them on every policy that is installed, and names the law that fails.

1. Values are finite float64 of shape [E] and [L, E], from before the first event on. Within a layer, `keep_values`
   and `keep_values_all` put the experts in the same order.
2. The order within a layer needs no events of other layers.
3. An event without experts, and events without router weights, are valid.
4. Values depend on past events only: what comes after an event changes nothing before it.
5. Asking for values changes nothing.
6. A policy may not depend on which expert is which: when the experts are renamed, the values move with the names.
   Leave ties as ties; the cache breaks them by index.
7. A policy that needs no popularity keeps at least 2 % more hits than eviction at random, on routing with popular and
   sticky experts.
8. `record` and `keep_values` run once per layer and step of a live engine. At E = 64 the budget is 40 us of CPU time
   for both; the test allows 200 us.

A policy knows numpy only; neither slots nor bytes nor devices.

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
        """[E] finite, not to be written to; higher = keep longer. Only the order within the layer matters.

        A policy whose values are ready in memory inherits this row of them all.
        """
        row: Values = self.keep_values_all()[layer]
        return row

    def keep_values_all(self) -> Values:
        """[L, E] finite, comparable across layers: for one pool of slots that all layers share."""
        ...


class PolicyMaker(Protocol):
    """What a policy's file exports as `POLICY`: its class."""

    @property
    def needs(self) -> str:
        """What it needs to be of use: "popularity", "forecast" (from a predictor), or "" for nothing."""
        ...

    def __call__(self, num_layers: int, num_experts: int, popularity: Values | None = None) -> Policy:
        """`popularity` [L, E]: uses per token on an earlier trace, where there is one; a policy may start from it."""
        ...
