"""Layer after layer, each assigned exactly given the one before it; from both ends, the better of the two."""

from __future__ import annotations

from placement.cost import Layout
from placement.descent import chain_pass
from placement.layer import LayerCosts
from placement.packing import pack_layer
from placement.problem import PlacementProblem
from placement.run import Run


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """One linear assignment per layer, each end's first layer packed by load."""
    costs = LayerCosts(problem)
    for start in (0, problem.num_layers - 1):
        layout = Layout(chain_pass(costs, start, pack_layer(problem, start)[0]))
        run.offer(layout, f"chain from layer {start}")
    assert run.best is not None
    return run.best
