"""Layer after layer, the expert with the strongest pull first, to the device that pulls it."""

from __future__ import annotations

import numpy as np

from placement.cost import Layout
from placement.layer import LayerCosts
from placement.packing import pack_layer
from placement.problem import PlacementProblem
from placement.run import Run
from placement.swaps import LayerLoad, improve_by_swaps
from placement.topology import Floats, Ints


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """The first layer is packed by load, each other follows the one before it."""
    costs = LayerCosts(problem)
    device_of = np.zeros(problem.load.shape, np.int64)
    device_of[0] = pack_layer(problem, 0)[0]
    for layer in range(1, problem.num_layers):
        devices = _cheapest_first(costs.of(device_of, layer, after=False), problem.slots)
        if problem.balanced:
            view = LayerLoad.of(problem, costs.load[layer])
            devices = improve_by_swaps(costs.of(device_of, layer, after=False), view, devices)
        device_of[layer] = devices
    layout = Layout(device_of)
    run.offer(layout, "greedy")
    return layout


def _cheapest_first(cost: Floats, slots: Ints) -> Ints:
    """[E] devices, taking (expert, device) pairs by how much they save over the expert's mean cost."""
    devices = np.full(cost.shape[0], -1)
    free = slots.copy()
    saved = cost - cost.mean(1, keepdims=True)
    for flat in np.argsort(saved, axis=None, kind="stable"):
        expert, device = divmod(int(flat), slots.size)
        if devices[expert] < 0 and free[device] > 0:
            devices[expert] = device
            free[device] -= 1
    return devices
