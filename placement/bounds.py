"""Lower bounds: no layout of the problem costs less than this. What makes a plan's gap a proof.

Three, each valid on its own; the best one counts. All bound the traffic; a price on imbalance or on moves
only adds to it, and limits, pins and memory only take layouts away. Knows no solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.problem import PlacementProblem
from placement.sdp import PairTraffic, kept_at_most
from placement.topology import Floats


@dataclass(frozen=True)
class Bound:
    """No layout has a lower objective than `value`."""

    value: float
    method: str


def quick_bound(problem: PlacementProblem) -> Bound:
    """The row-top bound, and with one device or one layer the exact zero."""
    return Bound(max(0.0, _row_top(problem)), "row_top")


def lower_bound(problem: PlacementProblem, time_limit_s: float, start_better: float = np.inf) -> Bound:
    """The better of row-top and, where devices are alike and no expert has copies, the semidefinite bound.

    `start_better`: the cost of a plan at hand; the search for a better bound ends when it is met.
    """
    quick = quick_bound(problem)
    if not _semidefinite_applies(problem) or quick.value >= start_better:
        return quick
    levels = _levels(problem)
    value = sum(
        price * (1 - _kept_semidefinite(problem, groups, time_limit_s / len(levels))) for price, groups in levels
    )
    if value > problem.topology.node_hop_cost:
        return quick  # above the dearest layout there is: a proof that none keeps the limit on load
    return max(quick, Bound(max(0.0, value), "semidefinite"), key=lambda bound: bound.value)


def _levels(problem: PlacementProblem) -> list[tuple[float, int]]:
    """(price, number of groups): leaving a device costs the first, leaving its node the second on top."""
    topology = problem.topology
    levels = [(topology.gpu_hop_cost, problem.num_devices)]
    if topology.num_nodes > 1 and topology.node_hop_cost > topology.gpu_hop_cost:
        levels.append((topology.node_hop_cost - topology.gpu_hop_cost, topology.num_nodes))
    return [(price, groups) for price, groups in levels if price > 0 and groups > 1]


def _kept_semidefinite(problem: PlacementProblem, groups: int, time_limit_s: float) -> float:
    limit = np.inf if problem.max_imbalance is None else problem.max_imbalance / groups
    return kept_at_most(PairTraffic(problem.weights, groups, problem.load_share, limit), time_limit_s)


def _semidefinite_applies(problem: PlacementProblem) -> bool:
    """It needs the same number of experts on every device, and on every node."""
    full = problem.slots.sum() == problem.num_experts and np.ptp(problem.slots) == 0
    sizes = {len(devices) for devices in problem.topology.devices_of_node}
    return bool(full and len(sizes) == 1 and problem.spare_slots == 0 and problem.num_layers > 1)


def _row_top(problem: PlacementProblem) -> float:
    """Room on the largest device, and on the largest node, limits what can stay there."""
    topology = problem.topology
    room = problem.slots + problem.spare_slots
    node_room = np.bincount(topology.node_of, room, topology.num_nodes)
    copies = problem.spare_slots > 0
    on_device = _kept(problem.weights, int(room.max()), copies)
    on_node = _kept(problem.weights, int(node_room.max()), copies)
    total = float(problem.weights.sum())
    extra = topology.node_hop_cost - topology.gpu_hop_cost
    return topology.gpu_hop_cost * (total - on_device) + extra * (total - on_node)


def _kept(weights: Floats, room: int, copies: bool) -> float:
    """Traffic that can stay, at most: the tokens of an expert find at most `room` experts of the next layer where they
    are; and, unless an expert may have copies in several places, it is met by at most `room` of the layer before."""
    kept = 0.0
    for step in weights:
        rows = float(np.sort(step, 1)[:, -room:].sum())
        columns = float(np.sort(step, 0)[-room:].sum())
        kept += rows if copies else min(rows, columns)
    return kept
