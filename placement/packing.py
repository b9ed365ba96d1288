"""Packing one layer by load: EPLB's rule (github.com/deepseek-ai/EPLB), written for pins, nodes and unequal devices."""

from __future__ import annotations

import numpy as np

from placement.problem import PlacementProblem
from placement.swaps import LayerLoad, improve_by_swaps
from placement.topology import Floats, Ints

MOST_SWAPS = 30
"""Swaps after packing one layer: packing is close already, and the last digits cost the most time."""

Copies = list[tuple[int, int]]
"""(expert, device) of each further copy."""


def pack_layer(problem: PlacementProblem, layer: int, first: Ints | None = None) -> tuple[Ints, Copies]:
    """First copies [E] (those given, or packed), and replicas into the spare slots."""
    load = problem.load_share[layer]
    counts = copy_counts(load, problem.num_devices, problem.spare_slots * problem.num_devices)
    devices = _pack_first_copies(problem, np.asarray(load / counts), problem.pinned[layer]) if first is None else first
    return devices, _pack_replicas(problem, load / counts, counts, devices)


def copy_counts(load: Floats, num_devices: int, spare: int) -> Ints:
    """[E] copies of each expert: one more for the expert with most load per copy, `spare` times."""
    counts = np.ones(load.size, np.int64)
    for _ in range(spare):
        per_copy = np.where(counts < num_devices, load / counts, -1.0)
        counts[int(per_copy.argmax())] += 1
    return np.where(counts > num_devices, num_devices, counts)


def _pack_first_copies(problem: PlacementProblem, load: Floats, pinned: Ints) -> Ints:
    topology = problem.topology
    node_slots = np.bincount(topology.node_of, problem.slots, topology.num_nodes).astype(np.int64)
    node_share = np.bincount(topology.node_of, topology.fair_share, topology.num_nodes).astype(np.float64)
    pinned_node = np.where(pinned >= 0, topology.node_of[pinned], -1)
    node_of_expert = pack(load, node_share, node_slots, pinned_node)
    devices = pinned.copy()
    for node, members in enumerate(topology.devices_of_node):
        experts = np.flatnonzero(node_of_expert == node)
        local = np.array([np.flatnonzero(members == d)[0] if d >= 0 else -1 for d in pinned[experts]], np.int64)
        packed = pack(load[experts], topology.fair_share[members], problem.slots[members], local)
        devices[experts] = members[packed]
    return _even_out(problem, load, devices, pinned)


def pack(load: Floats, share: Floats, slots: Ints, pinned: Ints) -> Ints:
    """[E] bins: heaviest first into the bin that is least busy for its share and has a slot. Pinned ones stay."""
    bins = pinned.copy()
    used = np.bincount(bins[bins >= 0], minlength=slots.size)
    busy = np.bincount(bins[bins >= 0], load[bins >= 0], slots.size)
    for expert in np.argsort(-load, kind="stable"):
        if bins[expert] >= 0:
            continue
        after = np.where(used < slots, (busy + load[expert]) / share, np.inf)
        bins[expert] = int(after.argmin())
        used[bins[expert]] += 1
        busy[bins[expert]] += load[expert]
    return bins


def _even_out(problem: PlacementProblem, load: Floats, devices: Ints, pinned: Ints) -> Ints:
    """Swaps that lower what is above fair shares, then the busiest; a pin costs more than any load."""
    cost = np.where((pinned >= 0)[:, None] & (pinned[:, None] != np.arange(problem.num_devices)), 1e9, 0.0)
    total = load.sum() or 1.0
    view = LayerLoad(load / total, problem.topology.fair_share, 1.0, 1.0, problem.slots)
    return improve_by_swaps(cost, view, devices, MOST_SWAPS)


def _pack_replicas(problem: PlacementProblem, load: Floats, counts: Ints, devices: Ints) -> Copies:
    """Each further copy onto the least busy device that has room and no copy yet; dropped where there is none."""
    share = problem.topology.fair_share
    busy = np.bincount(devices, load, share.size)
    room = problem.slots + problem.spare_slots - np.bincount(devices, minlength=share.size)
    holds = np.zeros((load.size, share.size), bool)
    holds[np.arange(load.size), devices] = True
    copies: Copies = []
    for expert in np.repeat(np.argsort(-load, kind="stable"), counts[np.argsort(-load, kind="stable")] - 1):
        allowed = (room > 0) & ~holds[expert]
        if not allowed.any():
            continue
        device = int(np.where(allowed, (busy + load[expert]) / share, np.inf).argmin())
        holds[expert, device] = True
        room[device] -= 1
        busy[device] += load[expert]
        copies.append((int(expert), device))
    return copies
