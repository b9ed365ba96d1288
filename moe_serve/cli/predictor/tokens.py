"""`moe-serve predictor tokens TRACE... --output FILE`: which experts each token id used, for --ep-predictor.

stdout: one line about what was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.config.units import MIB

HELP = "Count which experts each token id used in a recorded trace, for serve --ep-predictor."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument(
        "traces",
        metavar="TRACE",
        nargs="+",
        help="Routing of one model with its token ids (.npz), as `moe-serve trace` writes it.",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="The .npz file to write.")
    add_force_flag(parser)


def run(args: argparse.Namespace) -> int:
    check_outputs(args, output=args.output)
    from moe_serve.parallel.front.token_uses import count_uses
    from moe_serve.planning.recordings import read_routes

    uses = count_uses(read_routes(args.traces))
    uses.save(args.output)
    num_ids, num_layers, num_experts = uses.counts.shape
    mib = args.output.stat().st_size / MIB
    print(f"{args.output}: {num_ids} token ids, {num_layers} layers of {num_experts} experts, {mib:.1f} MiB")
    return 0
