"""Two devices, all layers at once: exact over every combination of small changes between them.

Coordinate descent is stuck where several layers must change together. Here everything outside devices a
and b stays, each layer may take one of many states (its own, every swap of two experts across a and b, of
two pairs where those are few, or all splits where even these are few), and dynamic programming along the
chain finds the best combination.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

from placement.layer import LayerCosts
from placement.swaps import LayerLoad
from placement.topology import Floats, Ints

MOST_STATES = 300
"""States of a layer; a step of the chain costs the square of it."""


def improve_pair(costs: LayerCosts, device_of: Ints, a: int, b: int) -> Ints:
    """[L, E] a layout at least as good; differs only in which of a and b holds what."""
    states = [_layer_states(costs, device_of, layer, a, b) for layer in range(costs.problem.num_layers)]
    came_from = []
    best = states[0].cost
    for layer in range(1, len(states)):
        total = best[:, None] + _coupling(costs, states[layer - 1], states[layer], layer, a, b)
        came_from.append(total.argmin(0))
        best = total.min(0) + states[layer].cost
    chosen = int(best.argmin())
    new = device_of.copy()
    for layer in range(len(states) - 1, -1, -1):
        members = states[layer].members
        new[layer, members] = np.where(states[layer].on_b[chosen], b, a)
        chosen = int(came_from[layer - 1][chosen]) if layer else 0
    return new


class LayerStates:
    """The ways to split one layer's experts `members` [M] between two devices."""

    def __init__(self, members: Ints, on_b: npt.NDArray[np.bool_], cost: Floats) -> None:
        self.members = members
        self.on_b = on_b
        """[S, M] whether a member is on b; row 0 is how it is now."""
        self.cost = cost
        """[S] everything but the coupling between experts on a and b of neighbouring layers."""


def _layer_states(costs: LayerCosts, device_of: Ints, layer: int, a: int, b: int) -> LayerStates:
    devices = device_of[layer]
    members = np.flatnonzero((devices == a) | (devices == b))
    now = devices[members] == b
    on_b = _splits(now, costs.problem.slots[[a, b]])
    outside = _outside_cost(costs, device_of, layer, a, b)[members]
    cost = outside[:, 0].sum() + on_b @ (outside[:, 1] - outside[:, 0])
    if not costs.problem.balanced:
        return LayerStates(members, on_b, cost)
    view = LayerLoad.of(costs.problem, costs.load[layer])
    busy = np.tile(view.busy(devices), (on_b.shape[0], 1))
    load_b = on_b @ view.load[members]
    busy[:, b] = load_b / view.fair[b]
    busy[:, a] = (view.load[members].sum() - load_b) / view.fair[a]
    return LayerStates(members, on_b, cost + view.cost(busy))


def _outside_cost(costs: LayerCosts, device_of: Ints, layer: int, a: int, b: int) -> Floats:
    """[E, 2] cost of each expert on a or b, from own costs and from neighbours on other devices."""
    problem, pair = costs.problem, [a, b]
    cost = costs.own[layer][:, pair].copy()
    if layer > 0:
        before = device_of[layer - 1]
        others = np.flatnonzero((before != a) & (before != b))
        cost += costs.backward[layer - 1][:, others] @ costs.hops[before[others]][:, pair]
    if layer + 1 < problem.num_layers:
        after = device_of[layer + 1]
        others = np.flatnonzero((after != a) & (after != b))
        cost += costs.weights[layer][:, others] @ costs.hops[:, after[others]].T[:, pair]
    return np.asarray(cost)


def _coupling(costs: LayerCosts, here: LayerStates, there: LayerStates, layer: int, a: int, b: int) -> Floats:
    """[S, S'] traffic between the members of two neighbouring layers."""
    weights = costs.weights[layer - 1][np.ix_(here.members, there.members)]
    hop = costs.hops[a, b]
    first, second = here.on_b.astype(np.float64), there.on_b.astype(np.float64)
    # x(1-y) + (1-x)y = x + y - 2xy, summed with weights.
    return np.asarray(
        hop
        * ((first @ weights.sum(1))[:, None] + (second @ weights.sum(0))[None, :] - 2 * (first @ weights) @ second.T)
    )


def _splits(now: npt.NDArray[np.bool_], slots: Ints) -> npt.NDArray[np.bool_]:
    """[S, M] splits of M members, `now` [M] first, keeping the number on each device (moves need free slots)."""
    size, count = now.size, int(now.sum())
    if comb(size, count) <= MOST_STATES:
        rows = [now, *(_members(size, chosen) for chosen in combinations(range(size), count))]
        return np.array(rows, bool).reshape(len(rows), size)
    swaps = [(i, j) for i in np.flatnonzero(~now) for j in np.flatnonzero(now)]
    changes = [(), *swaps]
    doubles = comb(size - count, 2) * comb(count, 2) + len(swaps)
    if doubles < MOST_STATES:
        changes += [
            (*i, *j) for i in combinations(np.flatnonzero(~now), 2) for j in combinations(np.flatnonzero(now), 2)
        ]
    changed = np.tile(now, (len(changes), 1))
    for row, change in zip(changed, changes, strict=True):
        row[list(change)] ^= True
    return changed


def _members(size: int, chosen: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    row = np.zeros(size, bool)
    row[list(chosen)] = True
    return row
