"""Everything, in order of cost, within the time limit: exact where the size allows, else local search and polish."""

from __future__ import annotations

from placement.cost import Layout
from placement.errors import PlacementError
from placement.problem import PlacementProblem
from placement.replicate import add_replicas
from placement.run import Run
from placement.solvers import chain, layer_states, load_balance, local_search, round_robin, staged

STAGES_SHARE = 0.6
"""Of the time, where stages start the search."""


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """Never worse than round_robin or load_balance: they are tried too."""
    for simple in (round_robin, load_balance, chain):
        simple.solve(problem, run)
    if layer_states.applies(problem):
        _solve_exactly(problem, run)
    else:
        if problem.balanced and staged.applies(problem):
            _start_in_stages(problem, run)
        local_search.solve(problem, run)
    assert run.best is not None
    run.offer(add_replicas(problem, run.best), "replicas")
    return run.best


def _solve_exactly(problem: PlacementProblem, run: Run) -> None:
    """Where the time does not suffice for that, the best so far is the answer."""
    try:
        layer_states.solve(problem, run)
    except PlacementError as error:
        if error.field != "time_limit":
            raise


def _start_in_stages(problem: PlacementProblem, run: Run) -> None:
    """Under a limit on load a search over all devices at once is easily stuck; one that first decides between few
    large groups starts it elsewhere."""
    stages = Run(problem, seed=run.seed, effort=run.effort, time_limit_s=run.left_s * STAGES_SHARE)
    run.offer(staged.solve(problem, stages), "stages")
