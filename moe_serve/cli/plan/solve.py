"""`moe-serve plan TRACE --gpus G`: one or several solvers on a recorded trace, a table, and the best plan as JSON.

stdout: the table, then one line of JSON where a program reads it (see `print_json`). Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.cli.plan.flags import add_problem_flags, add_search_flags, positive
from moe_serve.cli.table import add_json_flag, print_json, table

if TYPE_CHECKING:
    from placement.cost import PlanCost
    from placement.plan import PlacementPlan
    from placement.problem import PlacementProblem
    from placement.run import Progress

HELP = "Plan for a recorded trace."
OUTPUTS = ("output", "html", "png", "sglang", "eplb")
PROVING_FRAC = 0.4
"""Share of the time limit for the lower bound; it usually ends much earlier."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("trace", metavar="TRACE", nargs="+", help="Recordings of one model, taken together.")
    parser.add_argument("--num-experts", type=positive, metavar="E", help="Where the recording does not say.")
    add_problem_flags(parser)
    add_search_flags(parser)
    group = parser.add_argument_group("results")
    group.add_argument("--output", type=Path, metavar="FILE", help="Write the best plan here (JSON).")
    group.add_argument("--html", type=Path, metavar="FILE", help="Write a page of tables, traffic and load maps.")
    group.add_argument("--png", type=Path, metavar="FILE", help="Write the maps as a picture; needs matplotlib.")
    group.add_argument("--sglang", type=Path, metavar="FILE", help="Write SGLang's --init-expert-location file.")
    group.add_argument(
        "--model-layers", type=positive, metavar="N", help="--sglang: layers of the model, dense ones too."
    )
    group.add_argument("--eplb", type=Path, metavar="FILE", help="Write EPLB's three maps (.npz).")
    add_force_flag(group)
    add_json_flag(group)


def run(args: argparse.Namespace) -> int:
    """Status 1 where no plan keeps the balance limit."""
    use_one_thread()
    check_outputs(args, **{name: getattr(args, name) for name in OUTPUTS})
    from moe_serve.planning import problems
    from moe_serve.planning.recordings import read_recording
    from placement.report import table_rows

    with problems.user_errors():
        trace, held_out = problems.split_sequences(
            read_recording(args.trace, args.num_experts), args.held_out, args.seed
        )
        problem = problems.problem_of(args, trace)
        plans = solve_all(args, problem, problems.provenance(trace))
        best = min(plans, key=lambda plan: plan.cost.rank)
        unseen = None if held_out is None else problems.problem_of(args, held_out)
        problems.write_results(args, problem, plans, best, unseen)
        curve = trade_off(args, problem)
    print(table(table_rows(problem, plans, unseen)))
    for point in curve:
        print(
            f"balance <= {point['max_imbalance']:g}: traffic {point['traffic']:.4f},"
            f" at least {point['lower_bound']:.4f}"
        )
    print_json(args, {**summary(plans, best), "curve": curve})
    return 0 if best.cost.feasible else 1


def trade_off(args: argparse.Namespace, problem: PlacementProblem) -> list[dict[str, float]]:
    """The best plan of the last solver named under each limit of --curve."""
    points = []
    for limit in args.curve or ():
        plans = solve_all(args, problem.with_(max_imbalance=limit), {}, args.solver[-1:])
        point = {"max_imbalance": limit, "lower_bound": plans[0].lower_bound, "gap": plans[0].gap}
        points.append({**point, **plans[0].cost.to_json()})
    return points


def use_one_thread() -> None:
    """The planner's matrices are small: several BLAS threads only wait for one another. Before numpy loads."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def solve_all(
    args: argparse.Namespace, problem: PlacementProblem, facts: dict[str, Any], solvers: Sequence[str] = ()
) -> list[PlacementPlan]:
    """One plan per solver, all held against the same bound."""
    from placement.solve import find_plan, prove_all

    limit_s = args.time_limit_s * (1 - PROVING_FRAC)
    search = {"seed": args.seed, "effort": args.effort, "time_limit_s": limit_s, "provenance": facts}
    plans = [find_plan(problem, name, progress=progress(args, name), **search) for name in solvers or args.solver]
    return prove_all(problem, plans, args.time_limit_s * PROVING_FRAC)


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
    return {
        "best": best.solver,
        "seed": best.seed,
        "plans": rows,
        "objective": best.objective,
        "trace": best.provenance,
    }
