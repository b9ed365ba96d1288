"""`moe-serve plan evaluate PLAN TRACE`: what a plan costs on another workload than it was made for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli.plan.flags import positive
from moe_serve.cli.plan.solve import use_one_thread

HELP = "Hold a plan against another trace."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="A plan written by `moe-serve plan --output`.")
    parser.add_argument("trace", metavar="TRACE", nargs="+", help="Recordings of one model, taken together.")
    parser.add_argument("--num-experts", type=positive, metavar="E", help="Where the recording does not say.")


def run(args: argparse.Namespace) -> int:
    use_one_thread()
    from moe_serve.planning import problems
    from placement.cost import evaluate
    from placement.plan import load_plan

    with problems.user_errors():
        plan = load_plan(args.plan)
        problem = problems.problem_of_plan(plan, problems.read_trace(args.trace, args.num_experts))
        cost = evaluate(problem, plan.layout)
    print(f"{'':14}{'planned':>10}{'here':>10}")
    for name in ("traffic", "cross_device", "cross_node", "balance_mean", "balance_worst"):
        print(f"{name:14}{getattr(plan.cost, name):10.4f}{getattr(cost, name):10.4f}")
    print(json.dumps({"solver": plan.solver, "planned": plan.cost.to_json(), "here": cost.to_json()}))
    return 0
