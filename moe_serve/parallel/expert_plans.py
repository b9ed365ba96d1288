"""Which rank holds which expert: a placement read from a file and held against the model, or the default.

Knows the planner's format; knows no torch and no processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_serve.errors import ConfigError
from placement.cost import Hosts, Layout, hosts_of
from placement.errors import PlacementError
from placement.plan import PlacementPlan, load_plan, make_plan
from placement.problem import PlacementProblem
from placement.topology import Ints, Topology

MAX_IMBALANCE = 1.25
"""Limit on a rank's load over its fair share, for plans made while serving without a plan.

Measured on two real traces and 8 ranks, on traffic that the plan was not made from: without a limit a new plan saved
26 and 27 % of the hops, and the busiest rank had 1.77 and 2.08 times its fair share. With this limit it saves 23 and
19 %, at 1.30 and 1.53. Contiguous experts have 1.39 and 1.56."""


def read_hosts(path: str | None, layers: Sequence[int], num_experts: int, num_ranks: int) -> Hosts:
    """The placement of a model whose MoE layers are the decoder layers `layers`; see `read_plan`."""
    return hosts_of(read_plan(path, layers, num_experts, num_ranks).layout, num_ranks)


def read_plan(path: str | None, layers: Sequence[int], num_experts: int, num_ranks: int) -> PlacementPlan:
    """The plan in a file, or without one the contiguous one.

    ConfigError names the field of the plan that does not fit, and what would.
    """
    if path is None:
        return contiguous_plan(layers, num_experts, num_ranks)
    try:
        plan = load_plan(Path(path))
    except PlacementError as error:
        raise ConfigError(f"--expert-plan: {error}") from error
    try:
        check_fit(plan, layers, num_experts, num_ranks)
    except PlacementError as error:
        raise ConfigError(f"--expert-plan {path}: {str(error).replace(': ', ' ', 1)}") from error
    return plan


def check_fit(plan: PlacementPlan, layers: Sequence[int], num_experts: int, num_ranks: int) -> None:
    """PlacementError names the field in which a plan is of another model, or for other ranks."""
    for name, planned, actual in (
        ("num_layers", plan.num_layers, len(layers)),
        ("num_experts", plan.num_experts, num_experts),
        ("num_devices", plan.num_devices, num_ranks),
    ):
        if planned != actual:
            raise PlacementError(
                name,
                f"is {planned}, but this model on --devices {num_ranks} has {actual};"
                " plan from a trace of this model and for as many GPUs as there are ranks",
            )
    recorded = plan.provenance.get("layer_ids")
    if recorded and recorded != list(layers):
        raise PlacementError(
            "layer_ids", f"are {recorded}, this model's MoE layers are {list(layers)}; plan from a trace of this model"
        )


def contiguous_plan(layers: Sequence[int], num_experts: int, num_ranks: int) -> PlacementPlan:
    """What ranks use without a plan, as a plan: it was made from nothing, and its cost says nothing."""
    if num_experts < num_ranks:
        raise ConfigError(f"--devices {num_ranks}: the model has {num_experts} experts per layer; use at most as many")
    shape = (len(layers), num_experts)
    load, transitions = np.ones(shape), np.zeros((shape[0] - 1, num_experts, num_experts))
    problem = PlacementProblem(load, transitions, Topology.even(num_ranks), max_imbalance=MAX_IMBALANCE)
    facts = {"solver": "contiguous", "seed": 0, "seconds": 0.0, "provenance": {"layer_ids": list(layers)}}
    return make_plan(problem, Layout(_contiguous_devices(*shape, num_ranks)), 0.0, "none", **facts)


def _contiguous_devices(num_layers: int, num_experts: int, num_ranks: int) -> Ints:
    """Equal runs of experts, the first ranks one more where they do not divide: 8 experts on 3 ranks are 3, 3, 2."""
    sizes = [len(part) for part in np.array_split(range(num_experts), num_ranks)]
    return np.tile(np.repeat(np.arange(num_ranks), sizes), (num_layers, 1))
