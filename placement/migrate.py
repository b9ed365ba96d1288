"""From one plan to another: which experts move, how many bytes, and in an order that never exceeds memory.

Every device has `places` places per layer in all; a copy must be written before the old one is dropped,
and only into a free place. Where every place is taken, moves form rings (a's expert to b, b's to a), and
one expert of a ring waits outside, in host memory, until its place is free: a "park".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from placement.cost import Bools, hosts_of
from placement.errors import PlacementError
from placement.plan import PlacementPlan


@dataclass(frozen=True)
class Step:
    """One step of a migration: "copy" from a device, "drop", "park" to host memory, "restore" from there."""

    action: str
    layer: int
    expert: int
    source: int
    """Device it is copied or dropped or parked from; -1 for restore."""
    target: int
    """Device it is written to; -1 for drop and park."""


def migration_steps(old: PlacementPlan, new: PlacementPlan, room: int | None = None) -> list[Step]:
    """Steps from old to new, at most `room` experts of a layer on a device at any time (the fuller plan's, if None)."""
    shape = (old.num_layers, old.num_experts, old.num_devices)
    if shape != (new.num_layers, new.num_experts, new.num_devices):
        raise PlacementError(
            "plan", f"the plans differ in layers, experts or devices: {shape}; both must be of one model"
        )
    before, after = hosts_of(old.layout, old.num_devices), hosts_of(new.layout, new.num_devices)
    needed = int(max(before.sum(1).max(), after.sum(1).max()))
    if room is not None and room < needed:
        raise PlacementError("room", f"the plans themselves need {needed} places per layer and device, got {room}")
    return [
        step for layer in range(shape[0]) for step in _layer_steps(layer, before[layer], after[layer], room or needed)
    ]


def _layer_steps(layer: int, holds: Bools, wanted: Bools, room: int) -> Iterator[Step]:
    holds = holds.copy()
    parked: set[int] = set()
    while not np.array_equal(holds, wanted):
        steps = list(_possible(layer, holds, wanted, room, parked)) or [_park(layer, holds, wanted)]
        for step in steps[:1]:
            _apply(step, holds, parked)
            yield step


def _possible(layer: int, holds: Bools, wanted: Bools, room: int, parked: set[int]) -> Iterator[Step]:
    """What can be done at once: drop what has another copy, then write where there is room."""
    for expert, device in np.argwhere(holds & ~wanted).tolist():
        if (holds[expert] & wanted[expert]).any():
            yield Step("drop", layer, expert, device, -1)
    free = holds.sum(0) < room
    for expert, device in np.argwhere(~holds & wanted).tolist():
        if free[device] and holds[expert].any():
            yield Step("copy", layer, expert, int(np.flatnonzero(holds[expert])[0]), device)
        elif free[device] and expert in parked:
            yield Step("restore", layer, expert, -1, device)


def _park(layer: int, holds: Bools, wanted: Bools) -> Step:
    """Every device that wants something is full: take out one expert that has to leave such a device."""
    full_and_wanting = (~holds & wanted).any(0)
    expert, device = np.argwhere(holds & ~wanted & full_and_wanting)[0].tolist()
    return Step("park", layer, expert, device, -1)


def _apply(step: Step, holds: Bools, parked: set[int]) -> None:
    if step.action in ("copy", "restore"):
        holds[step.expert, step.target] = True
        parked.discard(step.expert)
    else:
        holds[step.expert, step.source] = False
        if step.action == "park":
            parked.add(step.expert)


def moved_bytes(steps: list[Step], expert_bytes: int) -> int:
    """Bytes written to devices."""
    return expert_bytes * sum(step.action in ("copy", "restore") for step in steps)
