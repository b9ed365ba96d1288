"""The answer: which device holds which expert, what that costs, and how far from optimal it can be at most.

Written as JSON, so that a plan can be read, compared and loaded by anything. Knows no solver.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_serve_base.whole_files import write_text
from placement.cost import Layout, PlanCost, evaluate, no_replicas
from placement.errors import PlacementError
from placement.problem import PlacementProblem
from placement.topology import Ints

FORMAT = "moe-serve-placement"
VERSION = 1


@dataclass(frozen=True)
class PlacementPlan:
    """A layout with what is proven about it. `check` holds it against a problem."""

    layout: Layout
    num_devices: int
    node_of: Ints
    """[G] node of each device."""
    slots: Ints
    """[G] most first copies of one layer on a device; with `spare_slots` replicas on top."""
    spare_slots: int
    cost: PlanCost
    lower_bound: float
    """No layout has a lower `cost.total`."""
    bound_method: str
    solver: str
    seed: int
    seconds: float
    complete: bool = True
    """False where Ctrl-C or the time limit ended the search."""
    optimal: bool = False
    """The solver proved it."""
    objective: dict[str, Any] = field(default_factory=dict)
    """The settings it was solved under: choices, limits, prices, hop costs."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the trace came from."""

    @property
    def gap(self) -> float:
        """How far above the optimum the plan can be at most, relative to its own cost; 0 is optimal.

        1 for a plan over its balance limit: the bound is on plans that keep it.
        """
        if not self.cost.feasible:
            return 1.0
        return max(0.0, 1 - self.lower_bound / self.cost.total) if self.cost.total > 0 else 0.0

    @property
    def num_layers(self) -> int:
        return int(self.layout.device_of.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.layout.device_of.shape[1])

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "num_devices": self.num_devices,
            "node_of": self.node_of.tolist(),
            "slots": self.slots.tolist(),
            "spare_slots": self.spare_slots,
            "device_of": self.layout.device_of.tolist(),
            "replicas": self.layout.replicas.tolist(),
            "cost": self.cost.to_json(),
            "gap": self.gap,
            **{name: getattr(self, name) for name in FACTS},
        }

    @classmethod
    def from_json(cls, data: Any) -> PlacementPlan:
        """PlacementError names the field that is missing or wrong."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlacementError("format", f"is not {FORMAT!r}; this is no plan of `moe-serve plan`")
        if data.get("version") != VERSION:
            raise PlacementError(
                "version", f"is {data.get('version')!r}, this program reads {VERSION}; make the plan again"
            )
        shape = (_read(data, "num_layers", int), _read(data, "num_experts", int))
        num_devices = _read(data, "num_devices", int)
        plan = cls(
            layout=Layout(_ints(data, "device_of", shape), _replicas(data)),
            num_devices=num_devices,
            node_of=_ints(data, "node_of", (num_devices,)),
            slots=_ints(data, "slots", (num_devices,)),
            spare_slots=_read(data, "spare_slots", int),
            cost=_cost(_read(data, "cost", dict)),
            **{name: _read(data, name, kind) for name, kind in FACTS.items()},
        )
        check_layout(plan.layout, plan.slots, plan.spare_slots)
        return plan


FACTS: dict[str, Any] = {
    "lower_bound": float,
    "bound_method": str,
    "solver": str,
    "seed": int,
    "seconds": float,
    "complete": bool,
    "optimal": bool,
    "objective": dict,
    "provenance": dict,
}
"""Fields that are in a plan's JSON as they are, and their types."""


def _read(data: dict[str, Any], name: str, kind: type) -> Any:
    value = data.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or value != value:
        raise PlacementError(
            name, f"needs a {kind.__name__}, got {value!r:.40}; the file is damaged, make the plan again"
        )
    return value


def _ints(data: dict[str, Any], name: str, shape: tuple[int, ...]) -> Ints:
    try:
        array = np.asarray(data.get(name))
    except ValueError:
        array = np.zeros(0)
    if array.shape != shape or array.dtype.kind not in "iu":
        raise PlacementError(name, f"needs integers of shape {shape}; the file is damaged, make the plan again")
    return array.astype(np.int64)


def _replicas(data: dict[str, Any]) -> Ints:
    rows = _read(data, "replicas", list)
    return _ints(data, "replicas", (len(rows), 3)) if rows else no_replicas()


def _cost(data: dict[str, Any]) -> PlanCost:
    kinds = {name: int if name == "moved" else float for name in PlanCost.__dataclass_fields__}
    return PlanCost(**{name: _read(data, name, kind) for name, kind in kinds.items()})


def check_layout(layout: Layout, slots: Ints, spare_slots: int) -> None:
    """Every expert on a device, no device over its slots, no copy twice. PlacementError says which is broken."""
    devices, replicas, num_devices = layout.device_of, layout.replicas, slots.size
    if devices.min() < 0 or devices.max() >= num_devices:
        raise PlacementError("device_of", f"needs devices 0..{num_devices - 1}, got {devices.min()}..{devices.max()}")
    counts = np.stack([(devices == device).sum(1) for device in range(num_devices)], 1)
    if np.any(counts > slots):
        layer, device = np.argwhere(counts > slots)[0]
        raise PlacementError(
            "slots",
            f"layer {layer} has {counts[layer, device]} experts on device {device}, which holds {slots[device]}",
        )
    if not replicas.size:
        return
    limits = (*devices.shape, num_devices)
    if replicas.min() < 0 or np.any(replicas >= limits):
        raise PlacementError("replicas", f"rows are layer, expert, device, each below {limits}")
    copies = [(int(la), int(ex), int(de)) for la, ex, de in replicas]
    if len(set(copies)) < len(copies) or any(devices[la, ex] == de for la, ex, de in copies):
        raise PlacementError("replicas", "the same copy is listed twice")
    np.add.at(counts, (replicas[:, 0], replicas[:, 2]), 1)
    if np.any(counts > slots + spare_slots):
        raise PlacementError("spare_slots", "more replicas on a device than it has room for")


def check_plan(plan: PlacementPlan, problem: PlacementProblem) -> None:
    """PlacementError where the plan's shape does not fit the problem's. The problem may be another workload's."""
    for name, ours, theirs in (
        ("num_layers", plan.num_layers, problem.num_layers),
        ("num_experts", plan.num_experts, problem.num_experts),
        ("num_devices", plan.num_devices, problem.num_devices),
    ):
        if ours != theirs:
            raise PlacementError(
                name, f"the plan has {ours}, the trace or the flags say {theirs}; they must be of one model"
            )


def objective_of(problem: PlacementProblem) -> dict[str, Any]:
    """The settings a plan was made under, for the record."""
    topology = problem.topology
    return {
        "choices": problem.choices,
        "max_imbalance": problem.max_imbalance,
        "balance_price": problem.balance_price,
        "migration_price": problem.migration_price,
        "gpu_hop_cost": topology.gpu_hop_cost,
        "node_hop_cost": topology.node_hop_cost,
        "speed": topology.speed.tolist(),
        "expert_bytes": problem.expert_bytes,
        "replica_routing": problem.replica_routing,
        "pinned": int((problem.pinned >= 0).sum()),
    }


def make_plan(
    problem: PlacementProblem, layout: Layout, lower_bound: float, bound_method: str, **facts: Any
) -> PlacementPlan:
    """A plan with its cost computed afresh and its layout checked."""
    check_layout(layout, problem.slots, problem.spare_slots)
    cost = evaluate(problem, layout)
    return PlacementPlan(
        layout=layout,
        num_devices=problem.num_devices,
        node_of=problem.topology.node_of,
        slots=problem.slots,
        spare_slots=problem.spare_slots,
        cost=cost,
        lower_bound=min(lower_bound, cost.total) if cost.feasible else lower_bound,
        bound_method=bound_method,
        objective=objective_of(problem),
        **facts,
    )


def save_plan(plan: PlacementPlan, path: Path) -> None:
    """OutputError (an OSError) where it cannot be written."""
    write_text(path, json.dumps(plan.to_json()) + "\n")


def load_plan(path: Path) -> PlacementPlan:
    """Read and check. PlacementError names the file and the field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise PlacementError(
            "plan", f"cannot read {path}: {error}; is it a whole file written by `moe-serve plan`?"
        ) from None
    try:
        return PlacementPlan.from_json(data)
    except PlacementError as error:
        raise PlacementError(error.field, f"{str(error).removeprefix(error.field + ': ')} (in {path})") from None
