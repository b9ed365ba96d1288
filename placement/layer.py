"""One layer, given all others: the piece every search here is made of.

The traffic couples a layer only to its two neighbours. With those fixed, the cost of an expert is a
number per device, and the cheapest layer is a linear assignment of experts to slots, solved exactly
(Jonker-Volgenant, in scipy). A limit on load is met by prices on busy devices and then by swaps.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from placement.problem import PlacementProblem
from placement.swaps import LayerLoad, improve_by_swaps, settle
from placement.topology import Floats, Ints

FORBIDDEN = 1e6
"""Cost of a device a pinned expert may not be on; any real cost is a share, so at most of order 1."""
PRICE_ROUNDS = 12


def one_hot(devices: Ints, num_devices: int) -> Floats:
    """[E] devices as [E, G] of 0 and 1."""
    return np.eye(num_devices)[devices]


class LayerCosts:
    """Cost [E, G] of putting each expert of a layer on each device, given the neighbouring layers."""

    def __init__(self, problem: PlacementProblem) -> None:
        self.problem = problem
        self.weights = problem.weights
        self.backward = np.ascontiguousarray(self.weights.transpose(0, 2, 1))
        self.hops = problem.topology.hop_costs
        self.own = _own_costs(problem)
        self.load = problem.load_share

    def of(self, device_of: Ints, layer: int, before: bool = True, after: bool = True) -> Floats:
        """From `device_of` [L, E]; `before` and `after` say which neighbours count."""
        cost = self.own[layer].copy()
        num_devices = self.problem.num_devices
        if before and layer > 0:
            cost += self.backward[layer - 1] @ one_hot(device_of[layer - 1], num_devices) @ self.hops
        if after and layer + 1 < self.problem.num_layers:
            cost += self.weights[layer] @ one_hot(device_of[layer + 1], num_devices) @ self.hops.T
        return np.asarray(cost)

    def traffic(self, device_of: Ints) -> float:
        """Hop cost and own costs of a whole layout: the objective without the price of imbalance."""
        total = 0.0
        for layer in range(self.problem.num_layers):
            cost = self.of(device_of, layer, after=False)
            total += float(np.take_along_axis(cost, device_of[layer][:, None], 1).sum())
        return total


def _own_costs(problem: PlacementProblem) -> Floats:
    """[L, E, G] what an expert's place costs by itself: moving it from `current`, breaking a pin."""
    own = np.zeros((*problem.load.shape, problem.num_devices))
    if problem.priced_moves:
        own += problem.migration_price / problem.load.size
        np.put_along_axis(own, problem.current[..., None], 0.0, 2)
    pinned = problem.pinned >= 0
    own[pinned] = FORBIDDEN
    own[pinned, problem.pinned[pinned]] = 0.0
    return own


def assign(cost: Floats, slots: Ints) -> Ints:
    """[E] the cheapest device for each expert with at most `slots` [G] on a device. Exact."""
    columns = np.repeat(np.arange(slots.size), slots)
    rows, chosen = linear_sum_assignment(cost[:, columns])
    return np.asarray(columns[chosen[np.argsort(rows)]])


def place_layer(problem: PlacementProblem, cost: Floats, layer: int, load: Floats, now: Ints | None = None) -> Ints:
    """[E] devices for one layer of cost [E, G]; never worse than `now` under the problem's limit and price."""
    if not problem.balanced:
        return assign(cost, problem.slots)
    view = LayerLoad.of(problem, load)
    candidates = [priced_assignment(cost, problem.slots, view)]
    if now is not None:
        candidates.append(improve_by_swaps(cost, view, now))
    return min(candidates, key=lambda devices: settle(cost, view, devices))


def priced_assignment(cost: Floats, slots: Ints, view: LayerLoad) -> Ints:
    """Assignments under rising prices on overloaded devices, each made feasible by swaps; the best of them."""
    prices = np.zeros(slots.size)
    scale = float(np.ptp(cost[cost < FORBIDDEN / 2])) or 1.0
    best = improve_by_swaps(cost, view, assign(cost, slots))
    limit = view.limit if np.isfinite(view.limit) else 1.0
    for step in range(PRICE_ROUNDS):
        devices = assign(cost + view.load[:, None] * prices, slots)
        over = view.busy(devices) - limit
        best = min(best, improve_by_swaps(cost, view, devices), key=lambda d: settle(cost, view, d))
        if step and np.all(over <= 0):
            break
        prices = np.maximum(0.0, prices + scale * slots.size * over / (1 + 0.3 * step))
    return best
