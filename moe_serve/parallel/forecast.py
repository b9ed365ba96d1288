"""What a placement will send, from recorded routes: the planner's view of both modes, in rows and bytes per token.

Follows each recorded token through the layers as the ranks would. Knows traces and placements; knows no ranks.

Shape alphabet: N tokens, L MoE layers, K choices, E experts, G ranks, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_serve.parallel.plans import Hosts

Ints = npt.NDArray[np.int64]
COUNT_BYTES = 4


@dataclass(frozen=True)
class RowBytes:
    """Sizes of what travels, for one model."""

    dispatch: int
    """Hidden state with the token's ids and weights."""
    combine: int
    """A partial sum."""
    context: int
    """Keys and values of one token, all decoder layers."""

    @classmethod
    def of(cls, mode: str, hidden: int, top_k: int, itemsize: int, kv_elements: int, num_layers: int) -> RowBytes:
        """`kv_elements` per token over all layers; `num_layers` decoder layers; `itemsize` of activations."""
        sums = hidden * max(4, itemsize)
        if mode == "conventional":
            return cls(hidden * itemsize + 6 * top_k, sums, 0)
        return cls(hidden * itemsize + 7 * top_k + 5, sums + 4, kv_elements * itemsize + 4 * num_layers)


@dataclass(frozen=True)
class Forecast:
    """Means per token."""

    dispatch_rows: float
    combine_rows: float
    context_rows: float
    bytes_per_token: float


def forecast(mode: str, ids: npt.NDArray[np.integer], hosts: Hosts, homes: Ints, sizes: RowBytes) -> Forecast:
    """ids [N, L, K]; hosts [L, E, G] without replicas; homes [N]: where each token's sequence lives."""
    num_ranks = hosts.shape[2]
    device_of = hosts.argmax(2)
    dispatch = combine = 0
    here = homes
    for layer in range(ids.shape[1]):
        ranks = device_of[layer][ids[:, layer].astype(np.int64)]
        visits = (ranks[:, :, None] == np.arange(num_ranks)).any(1)
        after = homes if mode == "conventional" else ranks[:, 0]
        needed = visits.copy()
        needed[np.arange(len(ids)), after] = True  # the token itself goes where it will be
        dispatch += int(needed.sum() - needed[np.arange(len(ids)), here].sum())
        combine += int(visits.sum() - visits[np.arange(len(ids)), after].sum())
        here = after
    rows = dispatch / len(ids), combine / len(ids), float(num_ranks - 1) if mode == "coherent" else 0.0
    total = rows[0] * sizes.dispatch + rows[1] * sizes.combine + rows[2] * sizes.context
    return Forecast(*rows, total)
