"""`moe-serve predictor train TRACE... --output FILE`: learn from recorded routing; `evaluate` and the engine read it.

stdout: one line about what was written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError
from moe_serve.planning import KINDS
from predictors.methods import method_names

if TYPE_CHECKING:
    from predictors.trace import RoutingTrace

HELP = "Learn to predict routes from a recorded trace."


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("traces", metavar="TRACE", nargs="+", help=f"Routing of one model: {KINDS}.")
    parser.add_argument("--num-experts", metavar="N", type=int, help="Experts per layer, where TRACE does not say.")
    parser.add_argument("--method", choices=method_names(), default="pregate", help="Default: pregate.")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="Where to write the predictor.")
    parser.add_argument(
        "--model", metavar="FOLDER", help="The checkpoint that was traced, if TRACE does not name its fingerprint."
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="Of the training. Default: 0.")
    add_force_flag(parser)


def run(args: argparse.Namespace) -> int:
    check_outputs(args, output=args.output)
    from moe_serve.planning.recordings import read_routes
    from predictors import files
    from predictors.methods import find_method
    from predictors.predictor import Training

    trace = read_routes(args.traces, args.num_experts)
    fingerprint = _fingerprint(args.model, trace)
    print(f"learning {args.method} from {trace.num_tokens} tokens ...", file=sys.stderr)
    training, start = Training(trace, seed=args.seed), time.perf_counter()
    try:
        predictor = find_method(args.method).fit(training)
    except ValueError as error:
        raise ConfigError(f"--method {args.method}: {error}") from None
    files.save(args.output, args.method, predictor, training.shape, fingerprint)
    seconds, mib = time.perf_counter() - start, args.output.stat().st_size / MIB
    bound = f"for checkpoint {fingerprint[:12]}" if fingerprint else "for any checkpoint of this shape"
    print(f"{args.output}: {args.method} from {trace.num_tokens} tokens in {seconds:.0f} s, {mib:.1f} MiB, {bound}")
    return 0


def _fingerprint(folder: str | None, trace: RoutingTrace) -> str | None:
    """Of the traced checkpoint; ConfigError if the trace is of another one than `folder`."""
    parts = trace.meta.get("merged", [trace.meta])
    named = {part["fingerprint"] for part in parts if "fingerprint" in part}
    if folder is not None:
        from moe_serve.hf.checkpoint import checkpoint_fingerprint

        named.add(checkpoint_fingerprint(folder))
    if len(named) > 1:
        raise ConfigError("the traces (and --model) are of different checkpoints; give those of one")
    return next(iter(named), None)
