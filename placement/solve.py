"""One call from a problem to a plan: finds the solver by its name, keeps the best layout, adds the bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moe_serve_base.extensions import ExtensionError
from placement.bounds import Bound, lower_bound, quick_bound
from placement.errors import PlacementError
from placement.plan import PlacementPlan, make_plan
from placement.problem import PlacementProblem
from placement.run import Progress, Run, silent
from placement.solvers import SOLVERS
from placement.solvers.solver import Solver


def find_solver(name: str) -> Solver:
    """The solver of that name. PlacementError names the ones there are, or what is wrong with it."""
    try:
        solver: Solver = SOLVERS.find(name)
    except ExtensionError as error:
        raise PlacementError("solver", error.problem) from error
    return solver


def find_plan(
    problem: PlacementProblem,
    solver: str = "auto",
    *,
    seed: int = 0,
    effort: int = 20,
    time_limit_s: float = np.inf,
    bound: Bound | None = None,
    progress: Progress = silent,
    provenance: Mapping[str, Any] | None = None,
) -> PlacementPlan:
    """The best plan the solver finds. A Ctrl-C during the search ends it, and the best so far is the answer.

    `bound`: one already known, see `prove`; the quick one otherwise.
    """
    start = time.perf_counter()
    run = Run(problem, seed=seed, effort=effort, time_limit_s=time_limit_s, progress=progress)
    try:
        find_solver(solver)(problem, run)
    except KeyboardInterrupt:
        run.cut_short = True
    if run.best is None:
        find_solver("round_robin")(problem, run)
    assert run.best is not None
    assert run.best_cost is not None
    known = bound or quick_bound(problem)
    if run.optimal:
        known = Bound(run.best_cost.total, run.optimal_by)
    return make_plan(
        problem,
        run.best,
        known.value,
        known.method,
        solver=solver,
        seed=seed,
        seconds=time.perf_counter() - start,
        complete=not run.cut_short,
        optimal=run.optimal,
        provenance=dict(provenance or {}),
    )


def prove_all(problem: PlacementProblem, plans: Sequence[PlacementPlan], time_limit_s: float) -> list[PlacementPlan]:
    """The plans with the best lower bound there is: an optimal one's cost, else the best found within the time."""
    exact = [plan for plan in plans if plan.optimal]
    known = Bound(exact[0].lower_bound, exact[0].bound_method) if exact else None
    cheapest = min((plan.cost.total for plan in plans if plan.cost.feasible), default=np.inf)
    bound = known or prove(problem, time_limit_s, cheapest)
    return [replace(plan, lower_bound=bound.value, bound_method=bound.method) for plan in plans]


def prove(problem: PlacementProblem, time_limit_s: float, cheapest: float = np.inf) -> Bound:
    """The best lower bound within the time; after a Ctrl-C the quick one. Valid for every plan of the problem.

    `cheapest`: the cost of a plan at hand, at which the search for a bound can stop.
    """
    try:
        return lower_bound(problem, time_limit_s, cheapest)
    except KeyboardInterrupt:
        return quick_bound(problem)
