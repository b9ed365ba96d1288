"""The integer program: the whole problem where it is small, else windows of the best layout, one after another.

An answer that is only feasible is offered like any other layout and never called optimal.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from placement.cost import Layout
from placement.descent import chain_pass, descend, objective
from placement.layer import LayerCosts
from placement.packing import pack_layer
from placement.problem import PlacementProblem
from placement.program import Window, num_products
from placement.run import Run
from placement.topology import Ints

MOST_PRODUCTS = 20_000
"""Above this many product variables the whole problem gets nowhere in a minute (measured: E = 16, L = 24)."""
WINDOW_PRODUCTS = 2_500
WINDOW_S = 5.0


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """Starts from a descended chain, so that there is an answer from the beginning."""
    costs = LayerCosts(problem)
    start = descend(costs, chain_pass(costs, 0, pack_layer(problem, 0)[0]), lambda: run.out_of_time)
    run.offer(Layout(start), "descent")
    if num_products(costs) <= MOST_PRODUCTS:
        solve_whole(costs, start, run)
    else:
        polish(costs, start, run)
    assert run.best is not None
    return run.best


def solve_whole(costs: LayerCosts, start: Ints, run: Run) -> None:
    """Everything at once; proves optimality if it ends in time."""
    problem = costs.problem
    answer = Window(costs, start, range(problem.num_layers), range(problem.num_devices)).solve(run.left_s)
    if answer is None:
        run.cut_short = True
        return
    run.offer(Layout(answer.device_of), "integer program")
    # Replicas could still improve on the best layout without them.
    run.optimal = answer.optimal and problem.spare_slots == 0
    run.optimal_by = "ilp"
    run.cut_short = not answer.optimal


def polish(costs: LayerCosts, device_of: Ints, run: Run) -> Ints:
    """Windows until a whole round changes nothing. Never worse than `device_of`."""
    value = objective(costs, device_of)
    improved = True
    while improved:
        improved = False
        for layers, devices in _windows(costs, run.rng):
            if run.out_of_time:
                return device_of
            answer = Window(costs, device_of, layers, devices).solve(min(WINDOW_S, run.left_s))
            found = np.inf if answer is None else objective(costs, answer.device_of)
            if answer is not None and found < value - 1e-9:
                device_of, value, improved = answer.device_of, found, True
                run.offer(Layout(device_of), f"window of layers {layers[0]}..{layers[-1]}")
    return device_of


def _windows(costs: LayerCosts, rng: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
    """Single layers over all devices where load matters (else they are plain assignments), then short stretches of
    layers over pairs of devices."""
    problem = costs.problem
    if problem.balanced:
        for layer in range(problem.num_layers):
            yield [layer], list(range(problem.num_devices))
    pairs = list(combinations(range(problem.num_devices), 2))
    per_step = 2 * int(np.sort(problem.slots)[-2:].sum()) ** 2
    length = max(2, min(problem.num_layers, 1 + WINDOW_PRODUCTS // max(1, per_step)))
    for index in rng.permutation(len(pairs)).tolist():
        for first in range(0, max(1, problem.num_layers - length + 1), max(1, length - 1)):
            yield list(range(first, min(first + length, problem.num_layers))), list(pairs[index])
