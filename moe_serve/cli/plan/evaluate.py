"""`moe-serve plan evaluate PLAN TRACE`: what a plan costs on another workload than it was made for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli.plan.compare import COLUMNS
from moe_serve.cli.plan.flags import positive
from moe_serve.cli.plan.solve import use_one_thread
from moe_serve.cli.table import add_json_flag, number, print_json, table

HELP = "Hold a plan against another trace."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="A plan written by `moe-serve plan --output`.")
    parser.add_argument("trace", metavar="TRACE", nargs="+", help="Recordings of one model, taken together.")
    parser.add_argument("--num-experts", type=positive, metavar="E", help="Where the recording does not say.")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    use_one_thread()
    from moe_serve.planning import problems
    from moe_serve.planning.recordings import read_routes
    from placement.cost import evaluate
    from placement.plan import load_plan

    with problems.user_errors():
        plan = load_plan(args.plan)
        problem = problems.problem_of_plan(plan, read_routes(args.trace, args.num_experts))
        cost = evaluate(problem, plan.layout)
    rows = [[name, *(number(getattr(c, name), 4) for c in (plan.cost, cost))] for name in COLUMNS]
    print(table([["", "planned", "here"], *rows]))
    print_json(args, {"solver": plan.solver, "planned": plan.cost.to_json(), "here": cost.to_json()})
    return 0
