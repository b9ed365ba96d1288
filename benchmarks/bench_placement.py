"""The planner on real routing traces: contiguous, load_balance, ExFlow's staged method and ours, on held-out sequences.

    python benchmarks/bench_placement.py traces TRACES_FOLDER...   cut, balance, seconds, gap; 80/20 by sequence
    python benchmarks/bench_placement.py sizes                     synthetic chains: a plan and its gap within a limit

Sequences whose recorded name says "repetitive" (`..._True`) are left out. stdout: rows as they come, then one
line of JSON, always the last.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from placement.cost import evaluate
from placement.problem import PlacementProblem
from placement.solve import find_plan, prove_all
from placement.topology import Topology
from predictors import trace
from predictors.trace import RoutingTrace

SOLVERS = ("contiguous", "load_balance", "staged", "auto")
SIZES = ((8, 32), (16, 24), (64, 27), (128, 48), (256, 58))
SIZE_DEVICES = (8, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    traces = commands.add_parser("traces")
    traces.add_argument("folder", type=Path, nargs="+")
    traces.add_argument("--gpus", type=int, nargs="+", default=[4, 8, 16])
    traces.add_argument("--limits", type=float, nargs="+", default=[0, 1.1], help="0: none")
    traces.add_argument("--choices", nargs="+", default=["all", "top1"])
    traces.set_defaults(run=run_traces)
    sizes = commands.add_parser("sizes")
    sizes.set_defaults(run=run_sizes)
    for command in (traces, sizes):
        command.add_argument(
            "--time-limit", type=float, default=60.0, help="seconds per plan; the bound gets 40 %% of it"
        )
        command.add_argument("--effort", type=int, default=20)
    args = parser.parse_args()
    print(json.dumps(args.run(args)))


def run_traces(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for folder in args.folder:
        planning, held_out = split(read(folder))
        for choices in args.choices:
            for gpus in args.gpus:
                for limit in args.limits:
                    facts = {"model": folder.name, "choices": choices, "gpus": gpus, "limit": limit or None}
                    rows += one_setting(args, planning, held_out, facts)
    return rows


def read(folder: Path) -> RoutingTrace:
    """All traces of a model, without sequences marked repetitive."""
    parts = []
    for path in sorted(folder.glob("*.npz")):
        part = trace.load(path)
        names = part.meta.get("seq_names") or [""] * part.num_sequences
        kept = [s for s, name in enumerate(names) if not name.endswith("_True")]
        parts.append(part.select(kept) if kept else part)
    return trace.merge(parts)


def split(whole: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """80 % of the sequences for planning, the rest held out."""
    order = np.random.default_rng(0).permutation(whole.num_sequences).tolist()
    cut = int(0.8 * len(order))
    return whole.select(sorted(order[:cut])), whole.select(sorted(order[cut:]))


def one_setting(
    args: argparse.Namespace, planning: RoutingTrace, held_out: RoutingTrace, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    problems = [
        PlacementProblem.from_routes(
            part.ids, part.num_experts, Topology.even(facts["gpus"]), facts["choices"], max_imbalance=facts["limit"]
        )
        for part in (planning, held_out)
    ]
    limit_s = args.time_limit * 0.6
    plans = [find_plan(problems[0], name, effort=args.effort, time_limit_s=limit_s) for name in SOLVERS]
    rows = []
    for plan in prove_all(problems[0], plans, args.time_limit - limit_s):
        unseen = evaluate(problems[1], plan.layout)
        row = {
            **facts,
            "solver": plan.solver,
            "cut": plan.cost.cross_device,
            "worst_balance": plan.cost.balance_worst,
            "held_out_cut": unseen.cross_device,
            "held_out_balance": unseen.balance_mean,
            "seconds": plan.seconds,
            "gap": plan.gap,
        }
        print(
            "  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )
        rows.append(row)
    return rows


def run_sizes(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for experts, layers in SIZES:
        for gpus in (2, 4, *SIZE_DEVICES) if experts == 8 else SIZE_DEVICES:
            if experts % gpus:
                continue
            problem = planted_chain(experts, layers, gpus)
            start = time.perf_counter()
            plan = find_plan(problem, "auto", effort=args.effort, time_limit_s=args.time_limit * 0.6)
            left_s = args.time_limit - (time.perf_counter() - start)
            [plan] = prove_all(problem, [plan], 0.8 * left_s)
            row = {
                "experts": experts,
                "layers": layers,
                "gpus": gpus,
                "cut": plan.cost.cross_device,
                "gap": plan.gap,
                "bound": plan.bound_method,
                "optimal": plan.optimal,
                "seconds": time.perf_counter() - start,
            }
            print(
                "  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()),
                flush=True,
            )
            rows.append(row)
    return rows


def planted_chain(experts: int, layers: int, clusters: int, seed: int = 0) -> PlacementProblem:
    """A Markov chain in which experts of one hidden cluster tend to follow one another."""
    rng = np.random.default_rng(seed)
    cluster = np.stack([rng.permutation(experts) % clusters for _ in range(layers)])
    steps = []
    for here, there in pairwise(cluster):
        pull = rng.gamma(0.3, size=(experts, experts)) * np.where(here[:, None] == there[None, :], 0.5 * clusters, 1.0)
        steps.append(pull / pull.sum(1, keepdims=True))
    load = [rng.dirichlet(np.full(experts, 5.0))]
    for step in steps:
        load.append(load[-1] @ step)
    transitions = np.stack([now[:, None] * step for now, step in zip(load, steps, strict=False)])
    return PlacementProblem(np.stack(load), transitions, Topology.even(clusters))


if __name__ == "__main__":
    main()
