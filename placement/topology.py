"""Devices and what a hop between two of them costs. Knows nothing of experts beyond how many bytes fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from placement.errors import PlacementError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Topology:
    """G devices. Example: 4 GPUs on 2 nodes, a hop across nodes four times as dear:
    `Topology.even(4, gpus_per_node=2, node_hop_cost=4.0)` has node_of [0, 0, 1, 1] and hop costs
    [[0, 1, 4, 4], [1, 0, 4, 4], [4, 4, 0, 1], [4, 4, 1, 0]].
    """

    node_of: Ints
    """[G] node of each device; nodes are numbered from 0."""
    gpu_hop_cost: float = 1.0
    """Cost of moving one token's hidden state to another device of the same node."""
    node_hop_cost: float = 1.0
    """Cost of moving it to a device of another node."""
    speed: Floats = field(default_factory=lambda: np.zeros(0))
    """[G] relative speed; a device's fair share of the load is its share of the speed. Empty: all equal."""
    memory_bytes: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """[G] bytes for experts. Empty: no limit."""

    def __post_init__(self) -> None:
        node_of = np.asarray(self.node_of, np.int64)
        if node_of.ndim != 1 or not node_of.size:
            raise PlacementError("node_of", f"needs one node per device, got shape {node_of.shape}")
        if set(node_of.tolist()) != set(range(int(node_of.max()) + 1)):
            raise PlacementError("node_of", "number the nodes 0, 1, 2, ... without gaps")
        object.__setattr__(self, "node_of", node_of)
        object.__setattr__(self, "speed", self._per_device("speed", np.float64, np.ones(node_of.size)))
        object.__setattr__(self, "memory_bytes", self._per_device("memory_bytes", np.int64, np.zeros(0, np.int64)))
        if not 0 <= self.gpu_hop_cost <= self.node_hop_cost < np.inf:
            raise PlacementError(
                "node_hop_cost",
                f"needs 0 <= gpu_hop_cost <= node_hop_cost, got {self.gpu_hop_cost}, {self.node_hop_cost}",
            )

    def _per_device(self, name: str, dtype: type, default: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        given = np.asarray(getattr(self, name))
        if not given.size:
            return default
        if given.shape != (self.num_devices,):
            raise PlacementError(name, f"needs {self.num_devices} values, one per device, got shape {given.shape}")
        if not np.all(np.isfinite(given)) or not np.all(given > 0):
            raise PlacementError(name, "needs positive numbers")
        return given.astype(dtype)

    @classmethod
    def even(
        cls,
        num_devices: int,
        gpus_per_node: int | None = None,
        node_hop_cost: float = 1.0,
        memory_bytes: int | None = None,
    ) -> Topology:
        """Alike devices, `gpus_per_node` to a node (all on one node where None)."""
        if num_devices < 1:
            raise PlacementError("gpus", f"needs at least 1, got {num_devices}")
        per_node = num_devices if gpus_per_node is None else gpus_per_node
        if per_node < 1 or num_devices % per_node:
            raise PlacementError("gpus_per_node", f"must divide the {num_devices} devices, got {per_node}")
        return cls(
            node_of=np.arange(num_devices) // per_node,
            node_hop_cost=node_hop_cost,
            memory_bytes=np.full(0 if memory_bytes is None else num_devices, memory_bytes or 0),
        )

    @property
    def num_devices(self) -> int:
        return self.node_of.size

    @property
    def num_nodes(self) -> int:
        return int(self.node_of.max()) + 1

    @property
    def fair_share(self) -> Floats:
        """[G] the share of every layer's load that keeps all devices equally busy."""
        return np.asarray(self.speed / self.speed.sum())

    @property
    def hop_costs(self) -> Floats:
        """[G, G] cost of one hop from a device to another; 0 on the diagonal."""
        same_node = self.node_of[:, None] == self.node_of[None, :]
        costs = np.where(same_node, self.gpu_hop_cost, self.node_hop_cost)
        np.fill_diagonal(costs, 0.0)
        return costs

    @property
    def devices_of_node(self) -> list[Ints]:
        """For each node, its devices in order."""
        return [np.flatnonzero(self.node_of == node) for node in range(self.num_nodes)]
