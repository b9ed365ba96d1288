"""A baseline: ExFlow's two stages (arXiv 2401.08383), first experts to nodes, then to the devices of each node.

Each stage minimises its own crossings with the strongest search here, so what it loses against the joint
search is what staging loses. Where the problem has one node, its devices are split into groups of at most
four, two groups at least. It knows no balance of its own: under a limit each stage keeps its share of it,
and swaps repair what is left.
"""

from __future__ import annotations

import numpy as np

from placement.cost import Layout
from placement.errors import PlacementError
from placement.layer import LayerCosts
from placement.problem import PlacementProblem
from placement.run import Run
from placement.solvers import local_search
from placement.swaps import LayerLoad, improve_by_swaps
from placement.topology import Floats, Ints, Topology

GROUP = 4
"""Devices of a node where the topology has only one node."""


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """PlacementError where devices are not alike, or something is asked for that ExFlow does not have."""
    groups = _groups(problem)
    if not applies(problem):
        raise PlacementError(
            "solver", "staged needs alike devices, no pins, no moves to price, and E divisible by G; use auto"
        )
    node_of = _stage(problem, problem.load, problem.transitions, len(groups), problem.max_imbalance, run)
    device_of = np.zeros(problem.load.shape, np.int64)
    for node, devices in enumerate(groups):
        members = np.stack([np.flatnonzero(row == node) for row in node_of])
        load = np.take_along_axis(problem.load, members, 1)
        steps = [w[np.ix_(a, b)] for w, a, b in zip(problem.transitions, members, members[1:], strict=False)]
        transitions = np.array(steps).reshape(-1, members.shape[1], members.shape[1])
        chosen = _stage(problem, load, transitions, devices.size, problem.max_imbalance, run)
        np.put_along_axis(device_of, members, devices[chosen], 1)
    layout = Layout(_repair(problem, device_of))
    run.offer(layout, "staged")
    return layout


def applies(problem: PlacementProblem) -> bool:
    """Whether the problem has nothing that ExFlow does not have."""
    alike = problem.symmetric and len({group.size for group in _groups(problem)}) == 1
    return bool(alike and problem.slots.sum() == problem.num_experts)


def _groups(problem: PlacementProblem) -> list[Ints]:
    topology = problem.topology
    if topology.num_nodes > 1:
        return topology.devices_of_node
    count = max(2, topology.num_devices // GROUP)
    return np.array_split(np.arange(topology.num_devices), min(count, topology.num_devices))


def _stage(
    problem: PlacementProblem, load: Floats, transitions: Floats, parts: int, limit: float | None, run: Run
) -> Ints:
    """[L, E] parts, by local search on crossings alone."""
    part = PlacementProblem(
        np.maximum(load, np.finfo(np.float64).tiny),
        transitions,
        Topology.even(parts),
        max_imbalance=limit,
        choices=problem.choices,
    )
    stage = Run(part, seed=run.seed, effort=run.effort, time_limit_s=run.left_s / 2)
    return local_search.solve(part, stage).device_of


def _repair(problem: PlacementProblem, device_of: Ints) -> Ints:
    """Under a limit on load, swaps in each layer until it holds or no swap helps."""
    if not problem.balanced:
        return device_of
    costs = LayerCosts(problem)
    device_of = device_of.copy()
    for layer in range(problem.num_layers):
        view = LayerLoad.of(problem, costs.load[layer])
        device_of[layer] = improve_by_swaps(costs.of(device_of, layer), view, device_of[layer])
    return device_of
