"""What a placement will send, from recorded routes: the planner's view of every mode, in rows and bytes per token.

Follows each recorded token through the layers as the ranks would; where copies are equally good, ranks look at their
load and this does not. Knows traces and placements; knows no ranks.

Shape alphabet: N tokens, L MoE layers, K choices, E experts, G ranks, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_serve.parallel.expert_plans import Hosts
from moe_serve.parallel.modes.copies import Bools, Ints, choose_copies, visits

WAYS = ("conventional", "send", "recompute")
"""conventional, and coherent with the context sent as keys and values or recomputed from hidden states."""
GUESSED_TOKENS = 64


@dataclass(frozen=True)
class RowBytes:
    """Sizes of what travels, for one model and way."""

    dispatch: int
    """A token on its way to experts, with ids and weights."""
    combine: int
    """A partial sum."""
    whole: int
    """A sum of which no other rank has a part."""
    context: int
    """Keys and values of one token, all decoder layers."""

    @classmethod
    def of(cls, way: str, hidden: int, top_k: int, itemsize: int, kv_elements: int, num_layers: int) -> RowBytes:
        """`kv_elements` per token over all layers; `num_layers` decoder layers; `itemsize` of activations."""
        sums = hidden * max(4, itemsize)
        if way == "send":
            return cls(hidden * itemsize + 7 * top_k + 5, sums, sums, kv_elements * itemsize + 4 * num_layers)
        if way == "recompute":
            return cls(0, sums, hidden * itemsize, 0)
        return cls(hidden * itemsize + 6 * top_k, sums, sums, 0)


@dataclass(frozen=True)
class Forecast:
    """Means per token."""

    dispatch_rows: float
    combine_rows: float
    whole_rows: float
    context_rows: float
    bytes_per_token: float


def forecast(way: str, ids: npt.NDArray[np.integer], hosts: Hosts, homes: Ints, sizes: RowBytes) -> Forecast:
    """ids [N, L, K]; hosts [L, E, G]; homes [N]: where each token's sequence lives. `way`: one of WAYS."""
    assert way in WAYS
    follow = {"conventional": _conventional, "send": _moving, "recompute": _everywhere}[way]
    rows = np.zeros(3)
    for counts in follow(ids.astype(np.int64), hosts, homes):
        rows += counts
    dispatch, combine, whole = (rows / len(ids)).tolist()
    context = hosts.shape[2] - 1.0 if way == "send" else 0.0
    total = dispatch * sizes.dispatch + combine * sizes.combine + whole * sizes.whole + context * sizes.context
    return Forecast(dispatch, combine, whole, context, total)


Counts = tuple[int, int, int]
"""Rows out, parts of sums and whole sums, in one layer."""


def _conventional(ids: Ints, hosts: Hosts, homes: Ints) -> Iterator[Counts]:
    for layer in range(ids.shape[1]):
        others = int(_without(_visits(hosts[layer][ids[:, layer]], homes)[0], homes).sum())
        yield others, others, 0


def _moving(ids: Ints, hosts: Hosts, homes: Ints) -> Iterator[Counts]:
    here = homes
    for layer in range(ids.shape[1]):
        visited, first = _visits(hosts[layer][ids[:, layer]], here)
        others = _without(visited, here)
        count = others.sum(1)
        here = np.where(count == 0, here, np.where(count == 1, others.argmax(1), first))
        yield int(count.sum()), int(_without(visited, here).sum()), 0


def _everywhere(ids: Ints, hosts: Hosts, homes: Ints) -> Iterator[Counts]:
    """In the last layer only the home needs a sum."""
    num_layers, num_ranks = ids.shape[1], hosts.shape[2]
    for layer in range(num_layers):
        held = hosts[layer][ids[:, layer]]
        is_last = layer == num_layers - 1
        visited = _visits(held, homes if is_last else None)[0]
        sent = _without(visited, homes) if is_last else visited & ~held.all((1, 2))[:, None]
        is_whole = visited.sum(1) == 1
        times = 1 if is_last else num_ranks - 1
        yield 0, int(sent[~is_whole].sum()) * times, int(sent[is_whole].sum()) * times


def _visits(held: Bools, here: Ints | None) -> tuple[Bools, Ints]:
    """held [N, K, G] -> ranks visited [N, G] and that of the first choice [N]."""
    ranks = choose_copies(held, np.zeros(held.shape[2]), here)
    return visits(ranks, held.shape[2]), ranks[:, 0]


def _without(visited: Bools, ranks: Ints) -> Bools:
    """`visited` [N, G] but for one rank of each token."""
    left: Bools = visited & (ranks[:, None] != np.arange(visited.shape[1]))
    return left


def cheaper_context(hosts: Hosts, hidden: int, top_k: int, itemsize: int, kv_elements: int, num_layers: int) -> str:
    """ "send" or "recompute": which sends less if every expert is as likely as any other."""
    rng = np.random.default_rng(0)
    ids = rng.random((GUESSED_TOKENS, *hosts.shape[:2])).argpartition(top_k - 1, 2)[:, :, :top_k]
    homes = np.arange(GUESSED_TOKENS) % hosts.shape[2]

    def cost(way: str) -> float:
        sizes = RowBytes.of(way, hidden, top_k, itemsize, kv_elements, num_layers)
        return forecast(way, ids, hosts, homes, sizes).bytes_per_token

    return min(WAYS[1:], key=cost)
