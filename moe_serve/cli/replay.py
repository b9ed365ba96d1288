"""`moe-serve replay TRACE...`: what cache policies would hit and miss on recorded routing, without a device.

stdout: one table per capacity, each with the bound that no policy can pass.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_cache.policies import policy_names
from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.cli.table import number, table
from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError, TraceFileError
from moe_serve.planning import KINDS
from moe_serve_base.whole_files import whole_file, write_text

if TYPE_CHECKING:
    from expert_cache.simulation.capacity import Capacity
    from expert_cache.simulation.events import Events
    from expert_cache.simulation.replay import ReplayResult, Row
    from predictors.trace import RoutingTrace

HELP = "Judge expert-cache policies on recorded routing, without a device."
POOLS = ("per-layer", "global", "quota")
LACKING = {
    "popularity": "--profile TRACE: its ranking comes from an earlier trace",
    "forecast": "a predictor's forecasts, which a trace does not hold; leave it out",
}
"""What to say of a policy's need that is not met."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("traces", metavar="TRACE", nargs="+", help=f"Routing of one model, in order: {KINDS}.")
    parser.add_argument("--num-experts", metavar="N", type=int, help="Experts per layer, where TRACE does not say.")
    parser.add_argument(
        "--capacity",
        metavar="PERCENT",
        type=float,
        nargs="+",
        default=[12.5, 25.0, 50.0],
        help="Slots in percent of all experts, from 1 to 100. Default: 12.5 25 50.",
    )
    parser.add_argument(
        "--policies",
        metavar="NAME",
        nargs="+",
        choices=policy_names(),
        help=f"Among {', '.join(policy_names())}. Default: all that need nothing else.",
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        default="per-layer",
        help="Equal pools per layer, one global pool, or pools of unequal quotas learnt from --profile; "
        "the slots add up to the same number. Default: per-layer.",
    )
    parser.add_argument(
        "--profile",
        metavar="TRACE",
        nargs="+",
        help="Earlier traces of the same model, for the popularity that `static` needs and for quotas.",
    )
    parser.add_argument(
        "--bypass",
        action="store_true",
        help="Fetch misses to spare slots, and keep only what is worth most afterwards: pays with few slots.",
    )
    parser.add_argument("--concurrency", metavar="N", type=int, default=1, help="Sequences run together. Default: 1.")
    parser.add_argument("--limit-tokens", metavar="N", type=int, help="Replay only the first N tokens.")
    parser.add_argument("--expert-mib", metavar="X", type=float, help="Size of one expert; adds MiB per token.")
    parser.add_argument("--json", metavar="FILE", type=Path, help="Also write everything, by layer too, as JSON.")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="Also draw hits over capacity.")
    add_force_flag(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    from moe_serve.planning.recordings import read_routes

    trace = _load(args)
    profile = read_routes(args.profile, args.num_experts) if args.profile else None
    tables = list(_compare(args, trace, profile))
    if args.json:
        write_text(args.json, json.dumps(_as_json(args, trace, tables), indent=1) + "\n")
    if args.plot:
        _plot(args.plot, tables)
    return 0


Tables = list[tuple[float, "list[Row]"]]


def _check(args: argparse.Namespace) -> None:
    """Mistakes that a long replay should not end in."""
    for percent in args.capacity:
        if not 1 <= percent <= 100:
            raise ConfigError(f"--capacity {percent:g}: give percentages from 1 to 100, as 25 for a quarter")
    if args.limit_tokens is not None and args.limit_tokens < 1:
        raise ConfigError(f"--limit-tokens {args.limit_tokens}: give 1 or more")
    if args.concurrency < 1:
        raise ConfigError(f"--concurrency {args.concurrency}: give 1 or more")
    if args.expert_mib is not None and not args.expert_mib > 0:
        raise ConfigError(f"--expert-mib {args.expert_mib:g}: give a size above 0")
    if args.pool == "quota" and not args.profile:
        raise ConfigError("--pool quota needs --profile TRACE: quotas are learnt from an earlier trace")
    check_outputs(args, json=args.json, plot=args.plot)
    if args.plot:
        require_matplotlib()


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'moe-serve-engine[plot]'") from None


def _load(args: argparse.Namespace) -> RoutingTrace:
    from moe_serve.planning.recordings import read_routes

    trace = read_routes(args.traces, args.num_experts)
    return trace if args.limit_tokens is None else trace.head(args.limit_tokens)


def _compare(
    args: argparse.Namespace, trace: RoutingTrace, profile: RoutingTrace | None
) -> Iterable[tuple[float, list[Row]]]:
    """(capacity in percent, rows) for each capacity; prints each table as soon as it is known."""
    from expert_cache.simulation.events import events_of
    from expert_cache.simulation.replay import compare

    if profile is not None:
        _require_same_model(trace, profile)
    names = _policies(args.policies, profile is not None)
    events = events_of(trace, args.concurrency)
    profile_events = None if profile is None else events_of(profile, args.concurrency)
    popularity = None if profile is None else profile.popularity()
    for percent in args.capacity:
        rows = compare(events, names, _slots(args.pool, percent, trace, profile_events), popularity, args.bypass)
        print(_table(percent, trace, rows, args), flush=True)
        yield percent, rows


def _require_same_model(trace: RoutingTrace, profile: RoutingTrace) -> None:
    from predictors.trace import TraceError, merge

    try:
        merge([trace, profile])
    except TraceError as error:
        raise TraceFileError(str(error)) from None


def _policies(wanted: Sequence[str] | None, has_profile: bool) -> list[str]:
    from expert_cache.policies import find_policy
    from expert_cache.simulation.replay import usable_policies

    usable = usable_policies(has_profile)
    for name in wanted or ():
        if name not in usable:
            raise ConfigError(f"--policies {name} needs {LACKING[find_policy(name).needs]}")
    return list(wanted or usable)


def _slots(pool: str, percent: float, trace: RoutingTrace, profile: Events | None) -> Capacity:
    from expert_cache.simulation.capacity import Capacity
    from expert_cache.simulation.quotas import quota_slots

    uniform = Capacity.of_frac(percent / 100, trace.num_layers, trace.num_experts)
    if pool == "global":
        return Capacity.shared(uniform.total)
    if pool == "quota" and profile is not None:
        return quota_slots(profile, uniform.total, min(trace.top_k, uniform.total // trace.num_layers))
    return uniform


def _table(percent: float, trace: RoutingTrace, rows: list[Row], args: argparse.Namespace) -> str:
    cells = [["policy", "hits %", "gap closed %", "misses/token", *["MiB/token"] * bool(args.expert_mib)]]
    for row in rows:
        gap, misses = number(100 * row.gap_closed_frac, 1), number(row.result.bytes_per_token(1))
        cells.append([row.policy, number(100 * row.result.hit_frac), gap, misses])
        if args.expert_mib:
            cells[-1].append(number(row.result.bytes_per_token(args.expert_mib), 1))
    return f"{_title(percent, trace, rows[0].result, args)}\n{table(cells, indent='  ')}\n"


def _title(percent: float, trace: RoutingTrace, result: ReplayResult, args: argparse.Namespace) -> str:
    slots, pool = result.total_slots, args.pool + ", bypass" * args.bypass
    return (
        f"{percent:g} % of the experts: {slots} slots, {pool}, {slots / trace.num_layers:g} of {trace.num_experts} a "
        f"layer; {trace.num_tokens} tokens, {args.concurrency} at a time; union/slots {result.union_per_slot:.2f}"
    )


def _as_json(args: argparse.Namespace, trace: RoutingTrace, tables: Tables) -> dict[str, Any]:
    settings = {
        name: getattr(args, name) for name in ("traces", "profile", "pool", "bypass", "concurrency", "expert_mib")
    }
    rows = [_row_as_json(percent, row, args.expert_mib) for percent, rows in tables for row in rows]
    return {**settings, "tokens": trace.num_tokens, "layer_ids": trace.layer_ids.tolist(), "rows": rows}


def _row_as_json(percent: float, row: Row, expert_mib: float | None) -> dict[str, Any]:
    result = row.result
    return {
        "policy": row.policy,
        "capacity_percent": percent,
        "total_slots": result.total_slots,
        "hit_frac": result.hit_frac,
        "gap_closed_frac": None if math.isnan(row.gap_closed_frac) else row.gap_closed_frac,
        "misses_per_token": result.bytes_per_token(1),
        "bytes_per_token": result.bytes_per_token(expert_mib * MIB) if expert_mib else None,
        "union_per_slot": result.union_per_slot,
        "hits_by_layer": result.hits.tolist(),
        "misses_by_layer": result.misses.tolist(),
    }


def _plot(path: Path, tables: Tables) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="slots, % of all experts", ylabel="hits, % of expert uses")
    percents = [percent for percent, _ in tables]
    for column in zip(*(rows for _, rows in tables), strict=True):
        axes.plot(percents, [100 * row.result.hit_frac for row in column], marker="o", label=column[0].policy)
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
