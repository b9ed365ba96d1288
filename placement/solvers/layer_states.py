"""Exact: dynamic programming over every way to place one layer. For a few experts on a few devices.

A layer with E experts on G devices has E! / (slots!)... states: 2,520 for 8 experts on 4 devices. The
chain needs only the cheapest way to reach each state of each layer, so the optimum costs states squared
times layers. With one expert to a device only the renaming from layer to layer matters, and the
recombination of one layout with itself is exact already; that case is solved by `chain`.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from placement.cost import Layout
from placement.errors import PlacementError
from placement.layer import LayerCosts, one_hot
from placement.problem import PlacementProblem
from placement.run import Run
from placement.swaps import LayerLoad
from placement.topology import Floats, Ints

MOST_STATES = 3000
BLOCK_STATES = 512
"""States whose costs from all states before them are in memory at a time."""


def applies(problem: PlacementProblem) -> bool:
    """Whether the states are few enough, and no replicas are asked for."""
    return problem.spare_slots == 0 and num_states(problem) <= MOST_STATES


def num_states(problem: PlacementProblem) -> int:
    """Ways to place one layer, stopping to count beyond what could ever be enumerated."""
    if problem.slots.sum() != problem.num_experts:
        return MOST_STATES + 1
    left, count = problem.num_experts, 1
    for slots in problem.slots.tolist():
        count *= comb(left, slots)
        left -= slots
        if count > MOST_STATES:
            break
    return count


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """PlacementError where there are too many states."""
    if not applies(problem):
        raise PlacementError(
            "solver", f"layer_states needs at most {MOST_STATES} ways to place a layer and no replicas; use auto"
        )
    costs = LayerCosts(problem)
    states = np.array(list(_states(problem.num_experts, problem.slots.tolist())))
    best = _layer_costs(costs, states, 0)
    came_from = []
    for layer in range(1, problem.num_layers):
        reached, before = _cheapest_way(costs, states, layer, best)
        came_from.append(before)
        best = reached + _layer_costs(costs, states, layer)
        if run.out_of_time:
            raise PlacementError(
                "time_limit", "too short for layer_states, which has no answer before its end; use auto"
            )
    layout = Layout(_walk_back(states, int(best.argmin()), came_from))
    run.offer(layout, "layer_states")
    run.optimal, run.optimal_by = True, "layer_states"
    return layout


def _states(num_experts: int, slots: list[int]) -> list[list[int]]:
    """Every list of E devices with `slots` experts on each."""
    rows = [[-1] * num_experts]
    for device, count in enumerate(slots):
        rows = [_put(row, device, chosen) for row in rows for chosen in combinations(_free(row), count)]
    return rows


def _free(row: list[int]) -> list[int]:
    return [expert for expert, device in enumerate(row) if device < 0]


def _put(row: list[int], device: int, chosen: tuple[int, ...]) -> list[int]:
    return [device if expert in chosen else old for expert, old in enumerate(row)]


def _layer_costs(costs: LayerCosts, states: Ints, layer: int) -> Floats:
    """[S] what each state costs by itself."""
    view = LayerLoad.of(costs.problem, costs.load[layer])
    busy = np.stack([view.busy(row) for row in states])
    return np.asarray(costs.own[layer][np.arange(states.shape[1]), states].sum(1) + view.cost(busy))


def _cheapest_way(costs: LayerCosts, states: Ints, layer: int, best: Floats) -> tuple[Floats, Ints]:
    """[S] cheapest cost of each state of `layer` so far and the state before it."""
    size, devices = states.shape[1], costs.problem.num_devices
    spread = np.stack([one_hot(row, devices) for row in states]).reshape(len(states), -1)
    pull = (costs.backward[layer - 1] @ one_hot_all(states, devices) @ costs.hops).reshape(len(states), size * devices)
    reached, before = np.empty(len(states)), np.empty(len(states), np.int64)
    for start in range(0, len(states), BLOCK_STATES):
        block = slice(start, start + BLOCK_STATES)
        total = best[:, None] + pull @ spread[block].T
        before[block] = total.argmin(0)
        reached[block] = total.min(0)
    return reached, before


def one_hot_all(states: Ints, num_devices: int) -> Floats:
    """[S, E, G]"""
    return np.eye(num_devices)[states]


def _walk_back(states: Ints, last: int, came_from: list[Ints]) -> Ints:
    path = [last]
    for before in reversed(came_from):
        path.append(int(before[path[-1]]))
    return states[path[::-1]]
