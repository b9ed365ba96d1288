"""Which rank holds which expert: a placement read from a file and held against the model, or the default.

Knows the planner's format; knows no torch and no processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_serve.errors import ConfigError
from placement.cost import Layout, hosts_of
from placement.errors import PlacementError
from placement.plan import load_plan

Hosts = npt.NDArray[np.bool_]
"""[L, E, G] whether a rank holds an expert."""


def read_hosts(path: str | None, layers: Sequence[int], num_experts: int, num_ranks: int) -> Hosts:
    """The placement of a model whose MoE layers are the decoder layers `layers`.

    ConfigError names the field of the plan that does not fit, and what would.
    """
    if path is None:
        return contiguous(len(layers), num_experts, num_ranks)
    try:
        plan = load_plan(Path(path))
    except PlacementError as error:
        raise ConfigError(f"--expert-plan: {error}") from error
    for name, planned, actual in (
        ("num_layers", plan.num_layers, len(layers)),
        ("num_experts", plan.num_experts, num_experts),
        ("num_devices", plan.num_devices, num_ranks),
    ):
        if planned != actual:
            raise ConfigError(
                f"--expert-plan {path}: {name} is {planned}, but this model on --devices {num_ranks} has {actual};"
                " plan from a trace of this model and for as many GPUs as there are ranks"
            )
    recorded = plan.provenance.get("layer_ids")
    if recorded and list(recorded) != list(layers):
        raise ConfigError(
            f"--expert-plan {path}: layer_ids are {list(recorded)}, this model's MoE layers are {list(layers)};"
            " plan from a trace of this model"
        )
    return hosts_of(plan.layout, num_ranks)


def contiguous(num_layers: int, num_experts: int, num_ranks: int) -> Hosts:
    """Equal runs of experts, the first ranks one more where they do not divide: 8 experts on 3 ranks are 3, 3, 2."""
    if num_experts < num_ranks:
        raise ConfigError(f"--devices {num_ranks}: the model has {num_experts} experts per layer; use at most as many")
    device_of = np.repeat(np.arange(num_ranks), [len(part) for part in np.array_split(range(num_experts), num_ranks)])
    return hosts_of(Layout(np.tile(device_of, (num_layers, 1))), num_ranks)
