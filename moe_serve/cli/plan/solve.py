"""`moe-serve plan TRACE --gpus G`: one or several solvers on a recorded trace, a table, and the best plan as JSON.

stdout: the table, then one line of JSON, always the last. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_serve.cli.plan.flags import add_problem_flags, add_search_flags

if TYPE_CHECKING:
    from placement.bounds import Bound
    from placement.cost import PlanCost
    from placement.plan import PlacementPlan
    from placement.problem import PlacementProblem
    from placement.run import Progress

HELP = "Plan for a recorded trace."
PROVING_FRAC = 0.4
"""Share of the time limit for the lower bound; it usually ends much earlier."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("trace", metavar="TRACE", nargs="+", help="Routing traces of one model (.npz), taken together.")
    add_problem_flags(parser)
    add_search_flags(parser)
    group = parser.add_argument_group("results")
    group.add_argument("--output", type=Path, metavar="FILE", help="Write the best plan here (JSON).")


def run(args: argparse.Namespace) -> int:
    """Status 1 where no plan keeps the balance limit."""
    use_one_thread()
    from moe_serve import planning
    from placement.plan import save_plan
    from placement.report import as_table

    with planning.user_errors():
        trace, held_out = planning.split_sequences(planning.read_trace(args.trace), args.held_out, args.seed)
        problem = planning.problem_of(args, trace)
        plans = solve_all(args, problem, planning.provenance(trace))
        best = min(plans, key=lambda plan: plan.cost.rank)
        unseen = None if held_out is None else planning.problem_of(args, held_out)
        if args.output:
            save_plan(best, args.output)
    print(as_table(problem, plans, unseen))
    print(json.dumps(summary(plans, best)))
    return 0 if best.cost.feasible else 1


def use_one_thread() -> None:
    """The planner's matrices are small: several BLAS threads only wait for one another. Before numpy loads."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def solve_all(args: argparse.Namespace, problem: PlacementProblem, facts: dict[str, Any]) -> list[PlacementPlan]:
    """One plan per solver, all with the same bound."""
    from dataclasses import replace

    from placement.solve import find_plan, prove

    search_s = args.time_limit * (1 - PROVING_FRAC)
    plans = []
    for name in args.solver:
        shown = progress(args, name)
        plans.append(
            find_plan(
                problem, name, seed=args.seed, effort=args.effort, time_limit_s=search_s, progress=shown, provenance=facts
            )
        )
    known = min(plan.cost.total for plan in plans if plan.cost.feasible) if any(p.cost.feasible for p in plans) else None
    if any(plan.optimal for plan in plans):
        proven = next(plan for plan in plans if plan.optimal)
        return [replace(plan, lower_bound=proven.lower_bound, bound_method=proven.bound_method) for plan in plans]
    bound: Bound = prove(problem, args.time_limit * PROVING_FRAC, float("inf") if known is None else known)
    return [replace(plan, lower_bound=bound.value, bound_method=bound.method) for plan in plans]


def progress(args: argparse.Namespace, name: str) -> Progress:
    """One line on stderr for each better layout, with the time."""
    start = time.monotonic()

    def show(what: str, cost: PlanCost) -> None:
        print(f"{time.monotonic() - start:7.1f} s  {name}: {what}: {cost.total:.4f}", file=sys.stderr)

    def quiet(what: str, cost: PlanCost) -> None:
        """--quiet."""

    return quiet if args.quiet else show


def summary(plans: Sequence[PlacementPlan], best: PlacementPlan) -> dict[str, Any]:
    """Everything but the layouts, which --output writes."""
    rows = [
        {
            "solver": plan.solver,
            **plan.cost.to_json(),
            "lower_bound": plan.lower_bound,
            "bound_method": plan.bound_method,
            "gap": plan.gap,
            "seconds": plan.seconds,
            "complete": plan.complete,
            "optimal": plan.optimal,
        }
        for plan in plans
    ]
    return {"best": best.solver, "seed": best.seed, "plans": rows, "objective": best.objective, "trace": best.provenance}
