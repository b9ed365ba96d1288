"""`moe-serve predictor evaluate TRACE...`: what each method knows of the next layers, and what a cache gains by it.

stdout: two tables, recall by lookahead and replay by capacity.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_serve.cli.outputs import add_force_flag, check_outputs
from moe_serve.cli.table import line, number, table
from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError
from moe_serve.planning import KINDS
from moe_serve_base.whole_files import whole_file, write_text
from predictors.methods import method_names

if TYPE_CHECKING:
    from moe_serve.expert_routes.predictor_scores import Report
    from predictors.trace import RoutingTrace

HELP = "Judge predictors on recorded routing: recall by lookahead, and what a cache gains."
DISTANCES = (1, 2, 4, 8)
NAME_WIDTH, NUMBER_WIDTH = 16, 7


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("traces", metavar="TRACE", nargs="+", help=f"Routing of one model, a file per task: {KINDS}.")
    parser.add_argument("--num-experts", metavar="N", type=int, help="Experts per layer, where TRACE does not say.")
    parser.add_argument(
        "--method",
        metavar="NAME",
        nargs="+",
        choices=method_names(),
        help=f"Among {', '.join(method_names())}. Default: all that need nothing a trace does not hold.",
    )
    parser.add_argument(
        "--held-out",
        choices=("sequence", "task"),
        default="sequence",
        help="Test on a fifth of the sequences, or on each TRACE in turn; the rest is learnt from. Default: sequence.",
    )
    parser.add_argument(
        "--capacity",
        metavar="PERCENT",
        type=float,
        nargs="*",
        default=[25.0],
        help="Slots as a share of all experts, for the replay; nothing: no replay. Default: 25.",
    )
    parser.add_argument("--lookahead", metavar="D", type=int, nargs="+", default=DISTANCES, help="Default: 1 2 4 8.")
    parser.add_argument("--limit-tokens", metavar="N", type=int, help="Only the first N tokens of each TRACE.")
    parser.add_argument("--expert-mib", metavar="X", type=float, help="Size of one expert; adds MiB per token.")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="Of the split and of training. Default: 0.")
    parser.add_argument("--json", metavar="FILE", type=Path, help="Also write everything, by layer too, as JSON.")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="Also draw recall over layers.")
    add_force_flag(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    from moe_serve.expert_routes import predictor_scores

    traces = [_read(path, args) for path in args.traces]
    folds = predictor_scores.folds_of(traces, args.held_out, args.seed)
    methods = args.method or _default_methods(traces)
    distances = [d for d in args.lookahead if d < traces[0].num_layers] + [0]
    report = predictor_scores.Report()
    print(_recall_header(distances, traces[0]), flush=True)
    for name, report in predictor_scores.judge(folds, methods, distances, args.capacity, args.seed):
        if name in report.scores:
            print(_recall_row(name, report), flush=True)
    for percent in args.capacity:
        print("\n" + _replay_table(percent, report, args.expert_mib))
    if args.json:
        write_text(args.json, json.dumps(_as_json(args, report), indent=1) + "\n")
    if args.plot:
        _plot(args.plot, report)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Mistakes that a long run should not end in."""
    for name, values in (("--capacity", args.capacity), ("--expert-mib", [args.expert_mib or 1])):
        for value in values:
            if not value > 0 or (name == "--capacity" and value > 100):
                raise ConfigError(f"{name} {value:g}: give a number above 0{', up to 100' * (name == '--capacity')}")
    for value in (*args.lookahead, args.limit_tokens or 1):
        if value < 1:
            raise ConfigError(f"--lookahead, --limit-tokens: give 1 or more, not {value}")
    check_outputs(args, json=args.json, plot=args.plot)
    if args.plot:
        from moe_serve.cli.replay import require_matplotlib

        require_matplotlib()


def _read(path: str, args: argparse.Namespace) -> RoutingTrace:
    from moe_serve.planning.recordings import read_routes

    trace = read_routes([path], args.num_experts)
    return trace if args.limit_tokens is None else trace.head(args.limit_tokens)


def _default_methods(traces: Sequence[RoutingTrace]) -> list[str]:
    from moe_serve.expert_routes.predictor_scores import usable_methods

    return [name for name in method_names() if all(name in usable_methods(trace) for trace in traces)]


def _recall_header(distances: Sequence[int], trace: RoutingTrace) -> str:
    return (
        f"recall %: used experts among the {trace.top_k} most likely of {trace.num_experts}, d layers ahead;\n"
        f"before: all layers, before the token's first (in brackets: precision / recall % of what is at least 50 %\n"
        f"likely, d={distances[0]})\n{_recall_line('method', [f'd={d}' if d else 'before' for d in distances])}"
    )


def _recall_row(name: str, report: Report) -> str:
    scores = report.scores[name]
    first = scores.distances[0]
    sure = f"({number(100 * scores.sure_precision(first), 1)} / {number(100 * scores.sure_recall(first), 1)})"
    return f"{_recall_line(name, [number(100 * scores.recall(d)) for d in scores.distances])}   {sure}"


def _recall_line(name: str, cells: Sequence[str]) -> str:
    """Rows are shown as they come, so widths are not known from them."""
    return line([name, *cells], [NAME_WIDTH, *[NUMBER_WIDTH] * len(cells)], indent="  ")


def _replay_table(percent: float, report: Report, expert_mib: float | None) -> str:
    rows = report.replays[percent]
    lfru = rows["lfru"].uses - rows["lfru"].hits
    cells = [["evict by", "hits %", "misses/token", "fewer than lfru %", *["MiB/token"] * bool(expert_mib)]]
    for name, row in sorted(rows.items(), key=lambda item: item[1].hits):
        fewer = 100 * (lfru - (row.uses - row.hits)) / max(1, lfru)
        cells.append([name, number(100 * row.hit_frac), number(row.misses_per_token), number(fewer, 1)])
        if expert_mib:
            cells[-1].append(number(row.misses_per_token * expert_mib, 1))
    title = f"{percent:g} % of the experts in slots; a method evicts by its forecast of the coming tokens"
    return f"{title}\n{table(cells, indent='  ')}"


def _as_json(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in ("traces", "held_out", "limit_tokens", "expert_mib", "seed")}
    recall = {
        name: {
            str(d) if d else "before": {
                "recall": scores.recall(d),
                "sure_precision": _finite(scores.sure_precision(d)),
                "sure_recall": scores.sure_recall(d),
                "recall_by_layer": scores.recall_by_layer(d),
            }
            for d in scores.distances
        }
        for name, scores in report.scores.items()
    }
    replay = [
        {
            "evict_by": name,
            "capacity_percent": percent,
            "hit_frac": row.hit_frac,
            "misses_per_token": row.misses_per_token,
            "bytes_per_token": row.misses_per_token * args.expert_mib * MIB if args.expert_mib else None,
        }
        for percent, rows in report.replays.items()
        for name, row in rows.items()
    ]
    return {**settings, "methods": recall, "replay": replay}


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plot(path: Path, report: Report) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_layer, by_distance = figure.subplots(1, 2)
    for name, scores in report.scores.items():
        recalls = [math.nan if r is None else 100 * r for r in scores.recall_by_layer(scores.distances[0])]
        by_layer.plot(recalls, marker=".", label=name)
        by_distance.plot(range(len(scores.distances)), [100 * scores.recall(d) for d in scores.distances], marker="o")
    labels = [f"d={d}" if d else "before" for d in scores.distances]
    by_distance.set(xticks=range(len(labels)), xticklabels=labels, xlabel="layers ahead", ylabel="recall, %")
    by_layer.set(xlabel=f"MoE layer, forecast {labels[0]}", ylabel="recall, %")
    by_layer.legend()
    for axes in (by_layer, by_distance):
        axes.grid(alpha=0.3)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
