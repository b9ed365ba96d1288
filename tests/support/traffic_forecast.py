"""What a placement will send, from recorded routes: the planner's view of both modes, in rows and bytes per token.

Follows each recorded token through the layers as the ranks would; where copies are equally good, ranks look at their
load and this does not. Knows traces and placements; knows no ranks.

Shape alphabet: N tokens, L MoE layers, K choices, E experts, G ranks, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_serve.parallel.modes.copies import Bools, Ints, choose_copies, visits
from placement.cost import Hosts


@dataclass(frozen=True)
class RowBytes:
    """Sizes of what travels, for one model and mode."""

    dispatch: int
    """A token on its way to experts, with ids and weights."""
    combine: int
    """A partial sum."""
    whole: int
    """A sum of which no other rank has a part."""

    @classmethod
    def of(cls, mode: str, hidden: int, top_k: int, itemsize: int) -> RowBytes:
        """`mode`: an --ep-mode; `itemsize`: bytes of an activation's element."""
        sums = hidden * max(4, itemsize)
        if mode == "coherent":
            return cls(0, sums, hidden * itemsize)
        return cls(hidden * itemsize + 6 * top_k, sums, sums)


@dataclass(frozen=True)
class Forecast:
    """Means per token."""

    dispatch_rows: float
    combine_rows: float
    whole_rows: float
    bytes_per_token: float


def forecast(mode: str, ids: npt.NDArray[np.integer], hosts: Hosts, homes: Ints, sizes: RowBytes) -> Forecast:
    """ids [N, L, K]; hosts [L, E, G]; homes [N]: where each token's sequence lives. `mode`: an --ep-mode."""
    follow = {"conventional": _conventional, "coherent": _coherent}[mode]
    rows = np.zeros(3)
    for counts in follow(ids.astype(np.int64), hosts, homes):
        rows += counts
    dispatch, combine, whole = (rows / len(ids)).tolist()
    total = dispatch * sizes.dispatch + combine * sizes.combine + whole * sizes.whole
    return Forecast(dispatch, combine, whole, total)


Counts = tuple[int, int, int]
"""Rows out, parts of sums and whole sums, in one layer."""


def _conventional(ids: Ints, hosts: Hosts, homes: Ints) -> Iterator[Counts]:
    for layer in range(ids.shape[1]):
        others = int(_without(_visits(hosts[layer][ids[:, layer]], homes), homes).sum())
        yield others, others, 0


def _coherent(ids: Ints, hosts: Hosts, homes: Ints) -> Iterator[Counts]:
    """In the last layer only the home needs a sum."""
    num_layers, num_ranks = ids.shape[1], hosts.shape[2]
    for layer in range(num_layers):
        held = hosts[layer][ids[:, layer]]
        is_last = layer == num_layers - 1
        visited = _visits(held, homes if is_last else None)
        sent = _without(visited, homes) if is_last else visited & ~held.all((1, 2))[:, None]
        is_whole = visited.sum(1) == 1
        times = 1 if is_last else num_ranks - 1
        yield 0, int(sent[~is_whole].sum()) * times, int(sent[is_whole].sum()) * times


def _visits(held: Bools, here: Ints | None) -> Bools:
    """held [N, K, G] -> ranks visited [N, G]."""
    return visits(choose_copies(held, np.zeros(held.shape[2]), here), held.shape[2])


def _without(visited: Bools, ranks: Ints) -> Bools:
    """`visited` [N, G] but for one rank of each token."""
    left: Bools = visited & (ranks[:, None] != np.arange(visited.shape[1]))
    return left
