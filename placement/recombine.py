"""The best mixture of several layouts' layers, by dynamic programming (Viterbi) over the chain.

Layouts of different starts name their devices differently. Where renaming costs nothing (see
`PlacementProblem.symmetric`) each switch from one layout to another picks the best renaming, itself an
assignment; the names then stay, because only relative names matter after it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.optimize import linear_sum_assignment

from placement.layer import LayerCosts, one_hot
from placement.swaps import LayerLoad
from placement.topology import Floats, Ints, Topology


def recombine(costs: LayerCosts, pool: list[Ints]) -> Ints:
    """[L, E] the cheapest path through the `pool`'s layers; never worse than the best of the pool."""
    problem = costs.problem
    best = np.array([_layer_cost(costs, layout[0], 0) for layout in pool])
    came_from = []
    renamings = []
    for layer in range(1, problem.num_layers):
        step, renaming = _switches(costs, pool, layer)
        total = best[:, None] + step
        came_from.append(total.argmin(0))
        renamings.append(renaming)
        best = total.min(0) + np.array([_layer_cost(costs, layout[layer], layer) for layout in pool])
    return _walk_back(pool, int(best.argmin()), came_from, renamings)


def _layer_cost(costs: LayerCosts, devices: Ints, layer: int) -> float:
    """The cost of a layer apart from its neighbours."""
    problem = costs.problem
    view = LayerLoad.of(problem, costs.load[layer])
    own = costs.own[layer][np.arange(devices.size), devices].sum()
    return float(own + view.cost(view.busy(devices)))


def _switches(costs: LayerCosts, pool: list[Ints], layer: int) -> tuple[Floats, Ints]:
    """Traffic [K, K] between layout a's layer - 1 and b's layer, and b's new device names [K, K, G]."""
    problem = costs.problem
    here = np.stack([one_hot(layout[layer - 1], problem.num_devices) for layout in pool])
    there = np.stack([one_hot(layout[layer], problem.num_devices) for layout in pool])
    flow = np.einsum("aeg,bfe->abgf", here, (there.transpose(0, 2, 1) @ costs.backward[layer - 1]), optimize=True)
    step = np.zeros((len(pool), len(pool)))
    renaming = np.zeros((len(pool), len(pool), problem.num_devices), np.int64)
    for a in range(len(pool)):
        for b in range(len(pool)):
            names = (
                _best_names(flow[a, b], problem.topology) if problem.symmetric and a != b else _same_names(flow[a, b])
            )
            renaming[a, b] = names
            step[a, b] = (flow[a, b] * costs.hops[:, names]).sum()
    return step, renaming


def _same_names(flow: Floats) -> Ints:
    return np.arange(flow.shape[0])


def _best_names(flow: Floats, topology: Topology) -> Ints:
    """[G] new name of each device of the later layer, given flow [G from, G to]: nodes first, devices within."""
    nodes = topology.devices_of_node
    saved_by_node = topology.node_hop_cost - topology.gpu_hop_cost
    value = np.zeros((len(nodes), len(nodes)))
    inner = {}
    for i, here in enumerate(nodes):
        for j, there in enumerate(nodes):
            block = flow[np.ix_(here, there)]
            rows, columns = linear_sum_assignment(block, maximize=True)
            inner[i, j] = (here[rows], there[columns])
            value[i, j] = saved_by_node * block.sum() + topology.gpu_hop_cost * block[rows, columns].sum()
    names = np.zeros(flow.shape[0], np.int64)
    for i, j in zip(*linear_sum_assignment(value, maximize=True), strict=True):
        old, new = inner[int(i), int(j)]
        names[new] = old
    return names


def _walk_back(pool: list[Ints], last: int, came_from: list[Ints], renamings: list[Ints]) -> Ints:
    path = [last]
    for before in reversed(came_from):
        path.append(int(before[path[-1]]))
    path.reverse()
    names = np.arange(int(renamings[0].shape[2])) if renamings else None
    layers = [pool[path[0]][0]]
    for layer, (a, b) in enumerate(pairwise(path), 1):
        assert names is not None
        names = names[renamings[layer - 1][a, b]]
        layers.append(names[pool[b][layer]])
    return np.stack(layers)
