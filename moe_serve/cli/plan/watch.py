"""`moe-serve plan watch PLAN TRACE ...`: does live traffic still suit the plan, and would a new one pay for moving?

The trace is read in windows of whole sequences. Half of a window's sequences make a candidate, the other
half judges it. With `--follow-s` the files are looked at again whenever they change.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.cli.plan.flags import add_seconds_flag, number, positive
from moe_serve.cli.plan.solve import use_one_thread
from moe_serve.cli.table import add_json_flag, print_json
from moe_serve.config.units import MIB

if TYPE_CHECKING:
    from placement.drift import Migration, Stakes
    from placement.plan import PlacementPlan
    from predictors.trace import RoutingTrace

HELP = "Decide from a live trace when rebalancing pays for its migration."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="The plan in force.")
    parser.add_argument("trace", metavar="TRACE", nargs="+", help="Recordings of one model, taken together.")
    parser.add_argument("--num-experts", type=positive, metavar="E", help="Where the recording does not say.")
    parser.add_argument(
        "--window", type=positive, default=20_000, metavar="N", help="Tokens per decision. Default: 20000."
    )
    parser.add_argument(
        "--horizon", type=positive, metavar="N", help="Tokens a new plan is expected to serve. Default: 10 windows."
    )
    parser.add_argument(
        "--hidden-bytes",
        type=positive,
        default=8192,
        metavar="N",
        help="Bytes of one token's hidden state. Default: 8192.",
    )
    parser.add_argument(
        "--migration-weight",
        type=number,
        default=1.0,
        metavar="X",
        help="Cost of a moved byte, where a byte of traffic costs 1. Default: 1.",
    )
    add_seconds_flag(
        parser, "--time-limit-s", "--time-limit", 30.0, "Longest time to search for each candidate. Default: 30."
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Default: 0.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write the plan to move to here, if any.")
    add_force_flag(parser)
    add_json_flag(parser)
    add_seconds_flag(parser, "--follow-s", "--follow", None, "Look again every S seconds, until Ctrl-C.")


def run(args: argparse.Namespace) -> int:
    """One sentence per window, and one line of JSON (see `print_json`). A plan that pays is in force from then on."""
    use_one_thread()
    check_outputs(args, output=args.output)
    from moe_serve.planning import problems
    from placement.plan import load_plan, save_plan

    with problems.user_errors():
        plan = load_plan(args.plan)
        for number_, window in enumerate(_windows(args)):
            verdict, candidate = _decide(args, plan, window)
            print(_sentence(number_, window, verdict), flush=True)
            found = verdict.to_json()
            facts = {"window": number_, "tokens": window.num_tokens, "migrate": found.pop("adopt"), **found}
            print_json(args, facts)
            if verdict.adopt:
                plan = candidate
                if args.output:
                    save_plan(plan, args.output)
    return 0


def _sentence(window_number: int, window: RoutingTrace, verdict: Migration) -> str:
    return (
        f"window {window_number}, {window.num_tokens} tokens: {'move' if verdict.adopt else 'stay'}, {verdict.why};"
        f" traffic {verdict.traffic_now:.4f} -> {verdict.traffic_then:.4f},"
        f" balance {verdict.balance_now:.3f} -> {verdict.balance_then:.3f},"
        f" {verdict.moved_bytes / MIB:.0f} MiB to move"
    )


def _windows(args: argparse.Namespace) -> Iterator[RoutingTrace]:
    """Whole sequences, about --window tokens at a time; what is left over waits for more."""
    from moe_serve.planning.recordings import read_routes

    done = 0
    while True:
        trace = read_routes(args.trace, args.num_experts)
        window: list[int] = []
        tokens = 0
        for sequence in range(done, trace.num_sequences):
            window.append(sequence)
            tokens += int(trace.seq_offsets[sequence + 1] - trace.seq_offsets[sequence])
            if tokens >= args.window and len(window) > 1:
                yield trace.select(window)
                done, window, tokens = sequence + 1, [], 0
        if args.follow_s is None:
            return
        time.sleep(args.follow_s)


def _decide(args: argparse.Namespace, plan: PlacementPlan, window: RoutingTrace) -> tuple[Migration, PlacementPlan]:
    from moe_serve.planning import problems
    from moe_serve.planning.replanning import find_candidate, halves
    from placement.drift import judge

    problem, live = (problems.problem_of_plan(plan, half) for half in halves(window))
    # A move costs what it costs in hop bytes.
    stakes = _stakes(args, window, plan)
    hop_bytes = stakes.horizon_tokens * (live.num_layers - 1) * stakes.choices_per_hop * stakes.hidden_bytes
    price = problem.load.size * problem.expert_bytes * stakes.migration_weight / max(hop_bytes, 1.0)
    candidate = find_candidate(plan, problem, price, args.seed, args.time_limit_s)
    candidate = replace(candidate, provenance=problems.provenance(window))
    return judge(live, plan, candidate, stakes), candidate


def _stakes(args: argparse.Namespace, window: RoutingTrace, plan: PlacementPlan) -> Stakes:
    from placement.drift import Stakes

    return Stakes(
        hidden_bytes=args.hidden_bytes,
        horizon_tokens=args.horizon or 10 * args.window,
        choices_per_hop=1.0 if plan.objective.get("choices") == "top1" else float(window.top_k),
        migration_weight=args.migration_weight,
    )
