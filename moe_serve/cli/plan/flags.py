"""Flags the `plan` commands share. Imports no numpy: help must answer at once."""

from __future__ import annotations

import argparse
import math

from placement.solvers import solver_names


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def numbers(text: str) -> list[float]:
    return [number(part) for part in text.split(",")]


def add_seconds_flag(group: argparse._ActionsContainer, name: str, old: str, default: float | None, help: str) -> None:
    """A time flag with its unit in its name; `old`, the spelling without, works and is not shown."""
    dest = name.removeprefix("--").replace("-", "_")
    group.add_argument(name, dest=dest, type=number, default=default, metavar="S", help=help)
    group.add_argument(old, dest=dest, type=number, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_problem_flags(parser: argparse.ArgumentParser) -> None:
    _add_device_flags(parser.add_argument_group("devices"))
    _add_objective_flags(parser.add_argument_group("objective"))


def _add_device_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gpus", type=positive, default=8, metavar="G", help="Number of GPUs. Default: 8.")
    group.add_argument("--gpus-per-node", type=positive, metavar="N", help="GPUs of one node. Default: all.")
    group.add_argument(
        "--node-hop-cost",
        type=number,
        metavar="X",
        help="Cost of a hop between nodes, where a hop within a node costs 1. Default: 1.",
    )
    group.add_argument("--speed", type=numbers, metavar="X,X", help="Relative speeds, one per GPU. Default: all equal.")
    group.add_argument(
        "--memory-mib", type=numbers, metavar="N[,N]", help="Memory for experts of each GPU, in MiB. Default: no limit."
    )
    group.add_argument(
        "--expert-mib", type=number, default=1.0, metavar="X", help="Size of one expert, in MiB. Default: 1."
    )


def _add_objective_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--choices",
        choices=("all", "top1"),
        default="all",
        help="Which of a token's experts count as its path. Default: all.",
    )
    group.add_argument(
        "--max-imbalance",
        type=number,
        metavar="X",
        help="Limit of the busiest GPU's load over the mean, in every layer: 1.1 is 10 %% above the mean.",
    )
    group.add_argument(
        "--balance-price",
        type=number,
        default=0.0,
        metavar="X",
        help="Price of the load above the mean, added to the traffic. Default: 0.",
    )
    group.add_argument(
        "--replicas",
        type=int,
        default=0,
        metavar="N",
        help="Copies of experts per layer and GPU, beside its own. Default: 0.",
    )
    group.add_argument(
        "--replica-routing",
        choices=("nearest", "even"),
        default="nearest",
        help="Which copy of an expert a token goes to. Default: nearest.",
    )
    group.add_argument("--pin", nargs="+", default=[], metavar="L:E:G", help="Keep expert E of layer L on GPU G.")
    group.add_argument("--current", metavar="PLAN", help="The plan in force; moves from it cost --migration-price.")
    group.add_argument(
        "--migration-price",
        type=number,
        default=0.0,
        metavar="X",
        help="Cost of moving all experts away from --current; a part costs its share. Default: 0.",
    )


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument(
        "--solver", nargs="+", choices=solver_names(), default=["contiguous", "load_balance", "auto"], metavar="NAME",
        help=f"Of {', '.join(solver_names())}. Default: contiguous load_balance auto.",
    )  # fmt: skip
    add_seconds_flag(
        group, "--time-limit-s", "--time-limit", 60.0, "Longest time for each solver and its bound. Default: 60."
    )
    group.add_argument(
        "--effort", type=positive, default=20, metavar="N", help="Starts and rounds of the search. Default: 20."
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Same seed, same plan. Default: 0.")
    group.add_argument(
        "--curve",
        type=numbers,
        metavar="X,X",
        help="Also solve under each of these limits of --max-imbalance, to show the trade-off.",
    )
    group.add_argument(
        "--held-out", type=number, default=0.0, metavar="X",
        help="Keep this fraction of the sequences out of planning and report on them. Default: 0.",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="Show no progress.")
