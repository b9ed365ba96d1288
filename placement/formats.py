"""Plans as other systems read them, and other systems' load statistics as ours.

SGLang: `--init-expert-location FILE.json` takes an object whose one key is `physical_to_logical_map`
[model layers, physical experts]; physical expert p is on rank p // (physical experts / ranks). Rows of
layers without experts are needed too and not used (srt/eplb/expert_location.py).
EPLB: the same map for MoE layers only, with `logical_to_physical_map` [L, E, X] (-1 padded) and
`logical_count` [L, E]. Example with 4 experts on 2 devices, expert 0 on both, 3 places each, is in the tests.
Load statistics: EPLB's weight [L, E], or SGLang's recorded `logical_count` [steps, layers, E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from placement.cost import Layout, hosts_of
from placement.errors import PlacementError
from placement.plan import PlacementPlan, check_layout
from placement.topology import Floats, Ints


def physical_to_logical(plan: PlacementPlan) -> Ints:
    """[L, P] the expert at each physical place, P = devices x places per device, device by device.

    Devices with fewer experts than the fullest one get further copies of experts they lack, since these
    systems want the same number of places on every rank and leave none empty.
    """
    hosts = hosts_of(plan.layout, plan.num_devices)
    places = int(hosts.sum(1).max())
    rows = []
    for layer in range(plan.num_layers):
        row: list[int] = []
        for device in range(plan.num_devices):
            held = np.flatnonzero(hosts[layer, :, device]).tolist()
            spare = [expert for expert in range(plan.num_experts) if expert not in held]
            row += held + spare[: places - len(held)]
        rows.append(row)
    return np.array(rows)


def to_sglang(plan: PlacementPlan, layer_ids: Sequence[int], num_model_layers: int) -> dict[str, Any]:
    """The JSON object for `--init-expert-location`; start SGLang with `--ep-num-redundant-experts` P - E.

    `layer_ids` [L]: where the plan's layers are among the model's `num_model_layers`.
    """
    if len(layer_ids) != plan.num_layers:
        raise PlacementError(
            "layer_ids", f"needs {plan.num_layers} numbers, one per planned layer, got {len(layer_ids)}"
        )
    if num_model_layers <= max(layer_ids):
        raise PlacementError(
            "model_layers", f"must be above the last planned layer {max(layer_ids)}, got {num_model_layers}"
        )
    physical = physical_to_logical(plan)
    rows = np.tile(np.arange(physical.shape[1]) % plan.num_experts, (num_model_layers, 1))
    rows[list(layer_ids)] = physical
    return {"physical_to_logical_map": rows.tolist()}


def from_sglang(data: Any, num_experts: int, num_devices: int, layer_ids: Sequence[int]) -> Layout:
    """The layout in a `--init-expert-location` object."""
    if not isinstance(data, Mapping) or "physical_to_logical_map" not in data:
        raise PlacementError("physical_to_logical_map", "is missing; this is no SGLang expert location file")
    rows = _integers("physical_to_logical_map", data["physical_to_logical_map"], 2)
    if rows.shape[0] <= max(layer_ids):
        raise PlacementError(
            "physical_to_logical_map", f"has {rows.shape[0]} layers, layer {max(layer_ids)} is asked for"
        )
    return from_physical(rows[list(layer_ids)], num_experts, num_devices)


def from_physical(physical: Ints, num_experts: int, num_devices: int) -> Layout:
    """The layout of a physical_to_logical_map [L, P]; an expert's first place is its first copy."""
    physical = _integers("physical_to_logical_map", physical, 2)
    layers, places = physical.shape
    if places % num_devices:
        raise PlacementError("physical_to_logical_map", f"{places} places do not divide among {num_devices} devices")
    if physical.min() < 0 or physical.max() >= num_experts:
        raise PlacementError(
            "physical_to_logical_map", f"needs experts 0..{num_experts - 1}, got {physical.min()}..{physical.max()}"
        )
    device_of = np.full((layers, num_experts), -1)
    replicas: set[tuple[int, int, int]] = set()
    for layer, row in enumerate(physical.tolist()):
        for place, expert in enumerate(row):
            device = place // (places // num_devices)
            if device_of[layer, expert] < 0:
                device_of[layer, expert] = device
            elif device_of[layer, expert] != device:
                replicas.add((layer, expert, device))
    if np.any(device_of < 0):
        layer, expert = np.argwhere(device_of < 0)[0]
        raise PlacementError(
            "physical_to_logical_map", f"expert {expert} of layer {layer} has no place; every expert needs one"
        )
    layout = Layout(device_of, np.array(sorted(replicas), np.int64).reshape(-1, 3))
    room = np.full(num_devices, places // num_devices)
    check_layout(layout, room, places // num_devices)
    return layout


def to_eplb(plan: PlacementPlan) -> dict[str, Ints]:
    """EPLB's three maps."""
    physical = physical_to_logical(plan)
    count = np.stack([np.bincount(row, minlength=plan.num_experts) for row in physical])
    logical = np.full((plan.num_layers, plan.num_experts, int(count.max())), -1)
    used = np.zeros_like(count)
    for layer, row in enumerate(physical.tolist()):
        for place, expert in enumerate(row):
            logical[layer, expert, used[layer, expert]] = place
            used[layer, expert] += 1
    return {"physical_to_logical_map": physical, "logical_to_physical_map": logical, "logical_count": count}


def read_load(data: Any) -> Floats:
    """[L, E] load from EPLB's weight [L, E], or a mapping with SGLang's `logical_count` [steps, L, E] or [L, E]."""
    name = "load"
    if isinstance(data, Mapping):
        name = "logical_count"
        if name not in data:
            raise PlacementError(name, f"is missing; the recording has {', '.join(map(str, data)) or 'nothing'}")
        data = data[name]
    try:
        load = np.asarray(data, np.float64)
    except (TypeError, ValueError):
        raise PlacementError(name, "needs numbers [layers, experts]") from None
    if load.ndim == 3:
        load = load.sum(0)
    if load.ndim != 2 or 0 in load.shape:
        raise PlacementError(name, f"needs shape [layers, experts] or [steps, layers, experts], got {load.shape}")
    if not np.all(np.isfinite(load)) or np.any(load < 0):
        raise PlacementError(name, "has negative or non-finite counts; drop or repair that recording")
    return load


def _integers(name: str, value: Any, ndim: int) -> Ints:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.zeros(0)
    if array.ndim != ndim or array.dtype.kind not in "iu" or 0 in array.shape:
        raise PlacementError(name, f"needs integers with {ndim} axes, got {array.dtype} {array.shape}")
    return array.astype(np.int64)
