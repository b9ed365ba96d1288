"""`moe-serve plan migrate OLD NEW`: which experts move, how many bytes, in an order that never exceeds memory."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.cli.plan.flags import positive
from moe_serve.cli.table import add_json_flag, print_json
from moe_serve_base.whole_files import write_text

HELP = "List the moves from one plan to another."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--room", type=positive, metavar="N", help="Places per layer and GPU. Default: as many as the plans need."
    )
    parser.add_argument("--steps", type=Path, metavar="FILE", help="Write the steps here, one JSON object per line.")
    add_force_flag(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    check_outputs(args, steps=args.steps)
    from moe_serve.planning import problems
    from placement.migrate import migration_steps, moved_bytes
    from placement.plan import load_plan

    with problems.user_errors():
        old, new = load_plan(args.old), load_plan(args.new)
        steps = migration_steps(old, new, args.room)
    if args.steps:
        write_text(args.steps, "".join(json.dumps(vars(step)) + "\n" for step in steps))
    expert_bytes = int(new.objective.get("expert_bytes", 1))
    counts = Counter(step.action for step in steps)
    total = moved_bytes(steps, expert_bytes)
    print(
        f"{counts['copy'] + counts['restore']} experts written ({total / 2**20:.0f} MiB),"
        f" {counts['park']} through the host"
    )
    print_json(args, {"steps": len(steps), "moved_bytes": total, "expert_bytes": expert_bytes, **counts})
    return 0
