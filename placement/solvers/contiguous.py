"""Experts in order: the first ones on device 0, and so on. What serving systems do without a planner."""

from __future__ import annotations

import numpy as np

from placement.cost import Layout
from placement.fill import fill
from placement.problem import PlacementProblem
from placement.run import Run


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """Each device gets its slots' worth of neighbours, scaled down evenly where there are more slots than experts."""
    ends = np.cumsum(problem.slots) * problem.num_experts / problem.slots.sum()
    wish = np.searchsorted(ends, np.arange(problem.num_experts), side="right")
    layout = Layout(fill(problem, np.broadcast_to(wish, problem.load.shape)))
    run.offer(layout, "contiguous")
    return layout
