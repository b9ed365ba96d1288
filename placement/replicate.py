"""Copies of hot experts into the spare slots, where they save most traffic or relieve the busiest device."""

from __future__ import annotations

import numpy as np

from placement.cost import Layout, PlanCost, evaluate
from placement.layer import LayerCosts, one_hot
from placement.packing import pack_layer
from placement.problem import PlacementProblem
from placement.topology import Floats, Ints


def add_replicas(problem: PlacementProblem, layout: Layout) -> Layout:
    """The layout with copies added layer by layer, each layer's only if the whole plan's cost falls."""
    if not problem.spare_slots:
        return layout
    costs = LayerCosts(problem)
    best, cost = layout, evaluate(problem, layout)
    for layer in range(problem.num_layers):
        for rows in _proposals(costs, best, layer):
            best, cost = _keep_if_better(problem, best, cost, rows)
    return best


def _proposals(costs: LayerCosts, layout: Layout, layer: int) -> list[Ints]:
    """Sets of copies for one layer: all that save traffic, half of them, and those EPLB would choose."""
    gains = _traffic_gains(costs, layout.device_of, layer)
    chosen = _best_per_device(costs.problem, gains, layout.device_of[layer])
    rows = np.array([(layer, expert, device) for expert, device in chosen], np.int64).reshape(-1, 3)
    proposals = [rows, rows[: len(rows) // 2], rows[:1]]
    if costs.problem.balanced:
        proposals.append(_load_copies(costs, layout.device_of[layer], layer))
    return [rows for rows in proposals if len(rows)]


def _keep_if_better(problem: PlacementProblem, layout: Layout, cost: PlanCost, rows: Ints) -> tuple[Layout, PlanCost]:
    """Try `rows` [R, 3] in place of the layer's present copies."""
    others = layout.replicas[layout.replicas[:, 0] != rows[0, 0]]
    tried = Layout(layout.device_of, np.concatenate([others, rows]))
    new = evaluate(problem, tried)
    return (tried, new) if new.rank < cost.rank else (layout, cost)


def _traffic_gains(costs: LayerCosts, device_of: Ints, layer: int) -> Floats:
    """[E, G] traffic a copy there would save: fewer hops to reach it, and other ones afterwards."""
    problem, here = costs.problem, device_of[layer]
    arriving = np.tile(costs.load[layer][:, None] / problem.num_devices, (1, problem.num_devices))
    saved = np.zeros_like(arriving)
    if layer > 0:
        arriving = costs.backward[layer - 1] @ one_hot(device_of[layer - 1], problem.num_devices)
        saved = arriving * costs.hops[:, here].T
    if layer + 1 < problem.num_layers:
        onward = costs.weights[layer] @ one_hot(device_of[layer + 1], problem.num_devices) @ costs.hops.T
        share = arriving / np.maximum(arriving.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        saved += share * (np.take_along_axis(onward, here[:, None], 1) - onward)
    return saved


def _best_per_device(problem: PlacementProblem, gains: Floats, here: Ints) -> list[tuple[int, int]]:
    """(expert, device) with a gain, best first, as many per device as there are spare slots."""
    gains = gains.copy()
    gains[np.arange(here.size), here] = 0.0
    room = np.full(problem.num_devices, problem.spare_slots)
    chosen = []
    for flat in np.argsort(-gains, axis=None, kind="stable"):
        expert, device = divmod(int(flat), problem.num_devices)
        if gains[expert, device] <= 0:
            break
        if room[device]:
            room[device] -= 1
            chosen.append((expert, device))
    return chosen


def _load_copies(costs: LayerCosts, here: Ints, layer: int) -> Ints:
    """[R, 3] the hottest experts, each on the least busy devices that have spare room."""
    problem = costs.problem
    copies = pack_layer(problem, layer, here)[1]
    return np.array([(layer, expert, device) for expert, device in copies], np.int64).reshape(-1, 3)
