"""Swaps of two experts inside one layer, under a limit or a price on load.

The assignment alone cannot see load; swaps can, and reach a feasible layer from any start if one is near.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placement.cost import TOLERANCE
from placement.problem import PlacementProblem
from placement.topology import Floats, Ints

VIOLATION_PRICE = 1e4
"""Cost per unit of fair share above the limit; traffic is a share, so a violation always costs more."""


@dataclass(frozen=True)
class LayerLoad:
    """What load costs in one layer."""

    load: Floats
    """[E] share of the layer's load."""
    fair: Floats
    """[G] fair share of each device."""
    limit: float
    """Most load over fair share; infinite where there is no limit."""
    price: float
    """Cost per unit of the busiest device's load over its fair share."""
    slots: Ints
    """[G] most experts on each device."""

    @classmethod
    def of(cls, problem: PlacementProblem, load: Floats) -> LayerLoad:
        limit = np.inf if problem.max_imbalance is None else problem.max_imbalance
        return cls(load, problem.topology.fair_share, limit, problem.balance_price / problem.num_layers, problem.slots)

    def busy(self, devices: Ints) -> Floats:
        """[G] load over fair share."""
        return np.bincount(devices, self.load, self.fair.size) / self.fair

    def cost(self, busy: Floats) -> Floats:
        """Of loads [..., G]."""
        over = np.clip(busy - self.limit - TOLERANCE, 0, None).sum(-1) if np.isfinite(self.limit) else 0.0
        worst = self.price * (busy.max(-1) - 1) if self.price else 0.0
        return np.asarray(VIOLATION_PRICE * over + worst)


def settle(cost: Floats, view: LayerLoad, devices: Ints) -> float:
    """What a layer costs altogether."""
    return float(cost[np.arange(devices.size), devices].sum() + view.cost(view.busy(devices)))


def improve_by_swaps(cost: Floats, view: LayerLoad, devices: Ints, most: int = 500) -> Ints:
    """The best swap of two experts, again and again, until none helps."""
    num_experts = devices.size
    cost, view, devices = _fill_slots(cost, view, devices)
    for _ in range(most):
        gain, first, second = best_swap(cost, view, devices)
        if gain >= -1e-13:
            break
        devices[first], devices[second] = devices[second], devices[first]
    return devices[:num_experts]


def _fill_slots(cost: Floats, view: LayerLoad, devices: Ints) -> tuple[Floats, LayerLoad, Ints]:
    """Copies with an expert of no load and no cost in every empty slot, so that a move is a swap too."""
    empty = np.repeat(np.arange(view.slots.size), view.slots - np.bincount(devices, minlength=view.slots.size))
    cost = np.concatenate([cost, np.zeros((empty.size, cost.shape[1]))])
    load = np.concatenate([view.load, np.zeros(empty.size)])
    return cost, replace(view, load=load), np.concatenate([devices, empty])


def best_swap(cost: Floats, view: LayerLoad, devices: Ints) -> tuple[float, int, int]:
    """Change of cost by the best swap, and its two experts."""
    to = cost[:, devices]
    here = np.diagonal(to)
    change = to + to.T - here[:, None] - here[None, :]
    change = change + _load_change(view, devices)
    change[devices[:, None] == devices[None, :]] = 0.0
    flat = int(change.argmin())
    first, second = divmod(flat, devices.size)
    return float(change[first, second]), first, second


def _load_change(view: LayerLoad, devices: Ints) -> Floats:
    """[E, E] change of the load's cost when two experts swap devices."""
    busy = view.busy(devices)
    shift = (view.load[None, :] - view.load[:, None]) / view.fair[devices][:, None]
    after = busy[devices][:, None] + shift
    over = np.zeros_like(after)
    if np.isfinite(view.limit):
        excess = np.clip(after - view.limit - TOLERANCE, 0, None)
        before = np.clip(busy - view.limit - TOLERANCE, 0, None)[devices]
        over = VIOLATION_PRICE * (excess + excess.T - before[:, None] - before[None, :])
    if view.price:
        over = over + view.price * (np.maximum(np.maximum(after, after.T), _worst_other(busy, devices)) - busy.max())
    return over


def _worst_other(busy: Floats, devices: Ints) -> Floats:
    """[E, E] the busiest device other than the two of a pair of experts: one of the three busiest."""
    top = np.argsort(-busy, kind="stable")[:3]
    values = np.append(busy[top], [-np.inf, -np.inf])
    first, second = (devices == top[rank] if rank < top.size else np.zeros(devices.size, bool) for rank in (0, 1))
    has_first = first[:, None] | first[None, :]
    has_second = second[:, None] | second[None, :]
    return np.asarray(np.where(~has_first, values[0], np.where(~has_second, values[1], values[2])))
