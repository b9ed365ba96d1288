"""The question: which device holds which expert. Arrays in, validated; knows no trace format and no solver.

The objective is the one of ExFlow (arXiv 2401.08383): under context-coherent expert parallelism a token's
hidden state stays where its expert ran, so what travels is each step from an expert of one layer to an
expert of the next that lives elsewhere. Loads per layer are what EPLB balances; here they are a limit
or a price beside the traffic.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import PlacementError
from placement.topology import Floats, Ints, Topology

CHOICES = ("all", "top1")
ROUTINGS = ("nearest", "even")


def count_load(ids: npt.NDArray[np.integer], num_experts: int) -> Floats:
    """Expert load [L, E] of routes `ids` [N, L, K]: how many of the N tokens chose each expert."""
    _check_ids(ids, num_experts)
    layers = range(ids.shape[1])
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in layers]).astype(np.float64)


def count_transitions(ids: npt.NDArray[np.integer], num_experts: int, choices: str = "all") -> Floats:
    """Transitions [L-1, E, E] between consecutive layers of `ids` [N, L, K], rank 0 the largest gate weight.

    "top1": from a token's first expert to its first expert in the next layer. "all": all K x K pairs.
    Example: one token with experts [0, 1] then [1, 2] has top1 {0->1: 1} and all {0->1, 0->2, 1->1, 1->2: 1}.
    """
    _check_ids(ids, num_experts)
    if choices not in CHOICES:
        raise PlacementError("choices", f"must be one of {', '.join(CHOICES)}, got {choices!r}")
    top_k = 1 if choices == "top1" else ids.shape[2]
    counts = np.zeros((ids.shape[1] - 1, num_experts * num_experts))
    for layer in range(ids.shape[1] - 1):
        here, there = ids[:, layer, :top_k].astype(np.int64), ids[:, layer + 1, :top_k].astype(np.int64)
        for rank in range(top_k):
            pairs = here[:, rank : rank + 1] * num_experts + there
            counts[layer] += np.bincount(pairs.ravel(), minlength=num_experts * num_experts)
    return counts.reshape(-1, num_experts, num_experts)


def _check_ids(ids: npt.NDArray[np.integer], num_experts: int) -> None:
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise PlacementError("ids", f"needs integers [tokens, layers, choices], got {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= num_experts:
        raise PlacementError("ids", f"needs experts 0..{num_experts - 1}, got {ids.min()}..{ids.max()}")


@dataclass(frozen=True)
class PlacementProblem:
    """Put E experts of each of L layers on G devices. All arrays are checked and never written to."""

    load: Floats
    """[L, E] how often each expert is chosen; any unit, every layer above zero in total."""
    transitions: Floats
    """[L-1, E, E] how often expert i of a layer is followed by expert j of the next; any unit."""
    topology: Topology
    expert_bytes: int = 1
    slots: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[G] most experts of one layer on a device, replicas apart. Empty: an even split as memory allows."""
    spare_slots: int = 0
    """Room for replicas: this many more experts of every layer on every device."""
    max_imbalance: float | None = None
    """Hard limit, per layer, on a device's load over its fair share: 1.1 allows 10 % more than fair."""
    balance_price: float = 0.0
    """Or a price: on the worst device's load over its fair share less 1, mean over layers."""
    pinned: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """[L, E] the device an expert must be on; -1 is free. Empty: all free."""
    current: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """[L, E] where experts are now. Empty: no current plan."""
    migration_price: float = 0.0
    """Added to the objective times the share of all experts that move from `current`."""
    replica_routing: str = "nearest"
    """"nearest": a token goes to the cheapest copy from where it is. "even": copies share equally, as in EPLB."""
    choices: str = "all"
    """What the transitions count, for the record: see `count_transitions`."""

    def __post_init__(self) -> None:
        _set_checked(self)
        check_slots(self)

    @classmethod
    def from_routes(
        cls, ids: npt.NDArray[np.integer], num_experts: int, topology: Topology, choices: str = "all", **settings: Any
    ) -> PlacementProblem:
        """From routes `ids` [N, L, K]; `settings` are this class's other fields. Loads count all K choices."""
        transitions = count_transitions(ids, num_experts, choices)
        load = count_load(ids, num_experts)
        return cls(load, transitions, topology, choices=choices, **settings)

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])

    @property
    def num_devices(self) -> int:
        return self.topology.num_devices

    @property
    def weights(self) -> Floats:
        """[L-1, E, E] transitions as shares: they sum to 1, so that uncut traffic over 1-cost links is the cut."""
        return np.asarray(self.transitions / max(self.transitions.sum(), np.finfo(np.float64).tiny))

    @property
    def load_share(self) -> Floats:
        """[L, E] each layer's load as shares that sum to 1."""
        return np.asarray(self.load / self.load.sum(1, keepdims=True))

    @property
    def priced_moves(self) -> bool:
        return self.migration_price > 0 and self.current.size > 0

    @property
    def balanced(self) -> bool:
        """Whether load matters at all, as a limit or as a price."""
        return self.max_imbalance is not None or self.balance_price > 0

    @property
    def symmetric(self) -> bool:
        """Devices may be renamed inside a node, and nodes among themselves, without changing any cost."""
        sizes = {len(devices) for devices in self.topology.devices_of_node}
        alike = np.ptp(self.slots) == 0 and np.ptp(self.topology.speed) == 0
        return bool(alike and len(sizes) == 1 and not self.priced_moves and np.all(self.pinned < 0))

    def with_(self, **changes: Any) -> PlacementProblem:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def _set_checked(problem: PlacementProblem) -> None:
    load = _array("load", problem.load, 2)
    layers, experts = load.shape
    transitions = _array("transitions", problem.transitions, 3)
    if transitions.shape != (layers - 1, experts, experts):
        raise PlacementError(
            "transitions",
            f"needs shape {(layers - 1, experts, experts)} to go with load {load.shape}, got {transitions.shape}",
        )
    if np.any(load.sum(1) <= 0):
        raise PlacementError("load", f"layer {int(np.argmin(load.sum(1)))} has no load at all; use a longer trace")
    object.__setattr__(problem, "load", load)
    object.__setattr__(problem, "transitions", transitions)
    for name in ("pinned", "current"):
        object.__setattr__(problem, name, _devices(problem, name))
    _check_numbers(problem)


def _array(name: str, value: npt.ArrayLike, ndim: int) -> Floats:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise PlacementError(name, "needs numbers in a regular array") from None
    if array.ndim != ndim or (name == "load" and 0 in array.shape):
        raise PlacementError(name, f"needs {ndim} axes, none empty, got shape {array.shape}")
    if not np.all(np.isfinite(array)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise PlacementError(name, f"has {array[where]} at {list(where)}; drop or repair that recording")
    if np.any(array < 0):
        raise PlacementError(name, "has negative entries; counts are zero or more")
    return array


def _devices(problem: PlacementProblem, name: str) -> Ints:
    """[L, E] devices, -1 where free."""
    given = np.asarray(getattr(problem, name))
    if not given.size:
        return np.full(problem.load.shape, -1) if name == "pinned" else np.zeros((0, 0), np.int64)
    if given.shape != problem.load.shape or given.dtype.kind not in "iu":
        raise PlacementError(name, f"needs integers of shape {problem.load.shape}, got {given.dtype} {given.shape}")
    if given.max() >= problem.num_devices or given.min() < -(name == "pinned"):
        raise PlacementError(name, f"needs devices 0..{problem.num_devices - 1}, got {given.min()}..{given.max()}")
    return given.astype(np.int64)


def _check_numbers(problem: PlacementProblem) -> None:
    for name in ("balance_price", "migration_price"):
        if not 0 <= getattr(problem, name) < np.inf:
            raise PlacementError(name, f"needs a number of at least 0, got {getattr(problem, name)}")
    if problem.max_imbalance is not None and not problem.max_imbalance >= 1:
        raise PlacementError(
            "max_imbalance", f"needs at least 1 (1.1 allows 10 % over fair), got {problem.max_imbalance}"
        )
    if problem.expert_bytes < 1:
        raise PlacementError("expert_bytes", f"needs at least 1, got {problem.expert_bytes}")
    if problem.spare_slots < 0:
        raise PlacementError("spare_slots", f"needs at least 0, got {problem.spare_slots}")
    if problem.replica_routing not in ROUTINGS:
        raise PlacementError(
            "replica_routing", f"must be one of {', '.join(ROUTINGS)}, got {problem.replica_routing!r}"
        )
    if problem.choices not in CHOICES:
        raise PlacementError("choices", f"must be one of {', '.join(CHOICES)}, got {problem.choices!r}")


def check_slots(problem: PlacementProblem) -> None:
    """Fill in `slots`, and check them against experts, memory and pins."""
    slots = np.asarray(problem.slots)
    slots = slots.astype(np.int64) if slots.size else _even_slots(problem)
    if slots.shape != (problem.num_devices,) or np.any(slots < 0):
        raise PlacementError("slots", f"needs {problem.num_devices} counts, one per device, got {slots.tolist()}")
    if slots.sum() < problem.num_experts:
        raise PlacementError(
            "slots", f"{slots.sum()} slots for {problem.num_experts} experts of a layer; add devices or memory"
        )
    if np.any(slots + problem.spare_slots > memory_slots(problem)):
        raise PlacementError("memory_bytes", "too small for the slots and spare_slots asked for; lower those")
    for device in range(problem.num_devices):
        if np.any((problem.pinned == device).sum(1) > slots[device]):
            raise PlacementError(
                "pinned", f"more experts of one layer than device {device} has slots ({slots[device]})"
            )
    object.__setattr__(problem, "slots", slots)


def memory_slots(problem: PlacementProblem) -> Ints:
    """[G] experts of every layer that fit a device's memory."""
    if not problem.topology.memory_bytes.size:
        return np.full(problem.num_devices, np.iinfo(np.int64).max)
    return problem.topology.memory_bytes // (problem.num_layers * problem.expert_bytes)


def _even_slots(problem: PlacementProblem) -> Ints:
    """As even as memory allows: the lowest level at which all experts fit."""
    room = memory_slots(problem) - problem.spare_slots
    for level in range(-(-problem.num_experts // problem.num_devices), problem.num_experts + 1):
        slots = np.clip(room, 0, level)
        if slots.sum() >= problem.num_experts:
            return slots
    raise PlacementError(
        "memory_bytes",
        f"{int(np.clip(room, 0, None).sum())} experts of a layer fit, but there are {problem.num_experts}"
        f" (x {problem.num_layers} layers x {problem.expert_bytes} bytes); add devices or memory",
    )
