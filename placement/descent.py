"""Coordinate descent: every layer placed anew given its neighbours, until nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from placement.layer import LayerCosts, place_layer
from placement.swaps import LayerLoad, settle
from placement.topology import Ints


def chain_pass(costs: LayerCosts, start: int, first: Ints) -> Ints:
    """[L, E] a layout grown from layer `start` with devices `first` [E] to both ends."""
    problem = costs.problem
    device_of = np.zeros(problem.load.shape, np.int64)
    device_of[start] = first
    for layer in range(start + 1, problem.num_layers):
        cost = costs.of(device_of, layer, after=False)
        device_of[layer] = place_layer(problem, cost, layer, costs.load[layer])
    for layer in range(start - 1, -1, -1):
        cost = costs.of(device_of, layer, before=False)
        device_of[layer] = place_layer(problem, cost, layer, costs.load[layer])
    return device_of


def descend(costs: LayerCosts, device_of: Ints, stop: Callable[[], bool], sweeps: int = 50) -> Ints:
    """A layout that no change of a single layer improves; each step is exact, or at least not worse."""
    problem = costs.problem
    device_of = device_of.copy()
    stale = np.ones(problem.num_layers, bool)
    for sweep in range(sweeps):
        order = range(problem.num_layers) if sweep % 2 == 0 else range(problem.num_layers - 1, -1, -1)
        for layer in order:
            if stale[layer] and not stop():
                stale[layer] = False
                if _improve_layer(costs, device_of, layer):
                    stale[max(layer - 1, 0) : layer + 2] = True
                    stale[layer] = False
        if stop() or not stale.any():
            break
    return device_of


def _improve_layer(costs: LayerCosts, device_of: Ints, layer: int) -> bool:
    cost = costs.of(device_of, layer)
    now = device_of[layer]
    new = place_layer(costs.problem, cost, layer, costs.load[layer], now)
    view = LayerLoad.of(costs.problem, costs.load[layer])
    if settle(cost, view, new) >= settle(cost, view, now) - 1e-12:
        return False
    device_of[layer] = new
    return True


def objective(costs: LayerCosts, device_of: Ints) -> float:
    """The objective with violations priced, for comparing layouts without replicas in a search."""
    problem = costs.problem
    total = costs.traffic(device_of)
    for layer in range(problem.num_layers) if problem.balanced else ():
        view = LayerLoad.of(problem, costs.load[layer])
        total += float(view.cost(view.busy(device_of[layer])))
    return total
