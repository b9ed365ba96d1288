"""`moe-serve plan compare PLAN PLAN ...`: plans side by side, as made or on one trace."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli.plan.flags import positive
from moe_serve.cli.plan.solve import use_one_thread
from moe_serve.cli.table import add_json_flag, number, print_json, table

HELP = "Put plans side by side."
COLUMNS = ("traffic", "cross_device", "cross_node", "balance_mean", "balance_worst")


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument(
        "plan", type=Path, metavar="PLAN", nargs="+", help="Plans written by `moe-serve plan --output`."
    )
    parser.add_argument(
        "--trace", metavar="TRACE", nargs="+", help="Cost on this trace, not on the one each was made for."
    )
    add_json_flag(parser)
    parser.add_argument("--num-experts", type=positive, metavar="E", help="Where the recording does not say.")


def run(args: argparse.Namespace) -> int:
    use_one_thread()
    from moe_serve.planning import problems
    from moe_serve.planning.recordings import read_routes
    from placement.cost import evaluate
    from placement.plan import load_plan

    with problems.user_errors():
        plans = [load_plan(path) for path in args.plan]
        costs = [plan.cost for plan in plans]
        if args.trace:
            trace = read_routes(args.trace, args.num_experts)
            costs = [evaluate(problems.problem_of_plan(plan, trace), plan.layout) for plan in plans]
    shown = [["plan", *COLUMNS, "gap %"]]
    for path, plan, cost in zip(args.plan, plans, costs, strict=True):
        shown.append([str(path), *(number(getattr(cost, name), 4) for name in COLUMNS), number(100 * plan.gap)])
    print(table(shown))
    rows = [{"plan": str(path), **cost.to_json()} for path, cost in zip(args.plan, costs, strict=True)]
    print_json(args, {"plans": rows})
    return 0
