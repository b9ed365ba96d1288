"""The placement problem as an integer program over a window: some layers, the experts on some devices.

x[l, e, g] = 1 where expert e of layer l is on device g; z[l, e, f, g] <= both ends' x is the traffic from e
to f of the next layer that stays on g, and likewise for nodes. Sums of z over one end are at most the
slots times the other end's x, which makes the linear relaxation much tighter. A window of everything is
the whole problem (ExFlow's program, with limits on load, pins, moves and nodes added).

pulp writes it, HiGHS solves it where highspy is installed, else the CBC that comes with pulp.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pulp

from placement.layer import FORBIDDEN, LayerCosts
from placement.topology import Floats, Ints

BACKENDS = ("HiGHS", "PULP_CBC_CMD")

Group = tuple[str, int]
"""("gpu", device) or ("node", node)."""


@dataclass(frozen=True)
class Answer:
    """What the program's solver said."""

    device_of: Ints
    """[L, E] the whole layout, window and rest."""
    optimal: bool
    """Proven. pulp calls a merely feasible answer "Optimal" too; this one looks at `sol_status`."""


class Window:
    """The program for `layers` (consecutive) and the experts on `devices`; all others stay as in `device_of`."""

    def __init__(self, costs: LayerCosts, device_of: Ints, layers: Sequence[int], devices: Sequence[int]) -> None:
        self.costs, self.device_of = costs, device_of
        self.layers, self.devices = list(layers), list(devices)
        self.experts = {la: np.flatnonzero(np.isin(device_of[la], self.devices)) for la in self.layers}
        self.program = pulp.LpProblem("placement", pulp.LpMinimize)
        self.x: dict[tuple[int, int, int], pulp.LpVariable] = {}
        self._terms: list[tuple[pulp.LpVariable, float]] = []
        self._add_places()
        for here, there in pairwise(self.layers):
            self._add_kept(here, there)
        self.scale = 1.0 / (max((abs(weight) for _, weight in self._terms), default=0.0) or 1.0)
        self.program += pulp.LpAffineExpression([(variable, weight * self.scale) for variable, weight in self._terms])

    def _add_places(self) -> None:
        problem = self.costs.problem
        for layer in self.layers:
            cost = self._fixed_cost(layer)
            for expert in self.experts[layer].tolist():
                options = [device for device in self.devices if cost[expert, device] < FORBIDDEN / 2]
                for device in options:
                    variable = self.program.add_variable(f"x_{layer}_{expert}_{device}", cat="Binary")
                    self.x[layer, expert, device] = variable
                    self._terms.append((variable, float(cost[expert, device])))
                self.program += pulp.lpSum(self.x[layer, expert, device] for device in options) == 1
            for device in self.devices:
                self.program += self._sum(layer, device) <= int(problem.slots[device])
            self._add_load(layer)

    def _sum(self, layer: int, device: int) -> pulp.LpAffineExpression:
        experts = self.experts[layer].tolist()
        return pulp.lpSum(self.x[layer, e, device] for e in experts if (layer, e, device) in self.x)

    def _add_load(self, layer: int) -> None:
        """The hard limit on each device of the window, and the price of the busiest one."""
        problem = self.costs.problem
        fair, load = problem.topology.fair_share, self.costs.load[layer]
        worst = self.program.add_variable(f"worst_{layer}", lowBound=self._busiest_outside(layer))
        for device in self.devices if problem.balanced else ():
            experts = [e for e in self.experts[layer].tolist() if (layer, e, device) in self.x]
            busy = pulp.lpSum(float(load[e] / fair[device]) * self.x[layer, e, device] for e in experts)
            if problem.max_imbalance is not None:
                self.program += busy <= problem.max_imbalance
            if problem.balance_price:
                self.program += busy <= worst
        if problem.balance_price:
            self._terms.append((worst, problem.balance_price / problem.num_layers))

    def _busiest_outside(self, layer: int) -> float:
        problem = self.costs.problem
        busy = (
            np.bincount(self.device_of[layer], self.costs.load[layer], problem.num_devices)
            / problem.topology.fair_share
        )
        outside = np.delete(busy, self.devices)
        return float(outside.max()) if outside.size else 0.0

    def _fixed_cost(self, layer: int) -> Floats:
        """[E, G] cost of a place, given every expert outside the window and none inside."""
        costs = self.costs
        cost = costs.own[layer].copy()
        for other in (layer - 1, layer + 1):
            if not 0 <= other < costs.problem.num_layers:
                continue
            weights = costs.backward[other] if other < layer else costs.weights[layer]
            fixed = np.ones(costs.problem.num_experts, bool)
            if other in self.experts:
                fixed[self.experts[other]] = False
            hops = costs.hops[self.device_of[other][fixed]]
            cost += weights[:, fixed] @ hops
        return np.asarray(cost)

    def _add_kept(self, here: int, there: int) -> None:
        topology = self.costs.problem.topology
        saved = {"gpu": topology.gpu_hop_cost, "node": topology.node_hop_cost - topology.gpu_hop_cost}
        groups: list[tuple[Group, list[int]]] = [(("gpu", device), [device]) for device in self.devices]
        nodes = topology.node_of[self.devices]
        groups += [
            (("node", n), [d for d in self.devices if topology.node_of[d] == n]) for n in sorted(set(nodes.tolist()))
        ]
        crossing = self.costs.weights[here][np.ix_(self.experts[here], self.experts[there])].sum()
        base = self.program.add_variable(f"one_{here}", 1, 1)
        self._terms.append((base, float(crossing * topology.node_hop_cost)))
        for (kind, number), devices in groups:
            if saved[kind] > 0:
                self._add_group(here, there, f"{kind}{number}", devices, saved[kind])

    def _add_group(self, here: int, there: int, name: str, devices: list[int], saved: float) -> None:
        """Traffic between the layers that stays in a group of devices."""
        weights = self.costs.weights[here]
        room = int(self.costs.problem.slots[devices].sum())
        first = {e: self._within(here, e, devices) for e in self.experts[here].tolist()}
        second = {f: self._within(there, f, devices) for f in self.experts[there].tolist()}
        kept = {
            (e, f): self.program.add_variable(f"z_{here}_{name}_{e}_{f}", 0, 1)
            for e in first
            for f in second
            if weights[e, f] > 0
        }
        for (e, f), variable in kept.items():
            self._terms.append((variable, -saved * float(weights[e, f])))
            self.program += variable <= first[e]
            self.program += variable <= second[f]
        for e in first:
            self.program += pulp.lpSum(kept[e, f] for f in second if (e, f) in kept) <= room * first[e]
        for f in second:
            self.program += pulp.lpSum(kept[e, f] for e in first if (e, f) in kept) <= room * second[f]

    def _within(self, layer: int, expert: int, devices: list[int]) -> pulp.LpAffineExpression:
        return pulp.lpSum(self.x[layer, expert, d] for d in devices if (layer, expert, d) in self.x)

    def solve(self, time_limit_s: float, backend: str | None = None) -> Answer | None:
        """None where the solver found nothing in time, or the limits cannot be kept."""
        try:
            self.program.solve(_backend(backend, time_limit_s))
        except pulp.PulpSolverError:
            return None
        if self.program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        device_of = self._read()
        return None if device_of is None else Answer(device_of, self.program.sol_status == pulp.LpSolutionOptimal)

    def _read(self) -> Ints | None:
        """The layout; None where the values are none (HiGHS out of time without a solution leaves zeros)."""
        new = self.device_of.copy()
        for layer in self.layers:
            new[layer, self.experts[layer]] = -1
        for (layer, expert, device), variable in self.x.items():
            if (variable.value() or 0.0) > 0.5:
                new[layer, expert] = device
        return None if np.any(new < 0) else new


def num_products(costs: LayerCosts) -> int:
    """Variables z of the whole problem."""
    return int((costs.weights > 0).sum()) * costs.problem.num_devices


def available_backends() -> list[str]:
    return [name for name in BACKENDS if name in pulp.listSolvers(onlyAvailable=True)]


def _backend(name: str | None, time_limit_s: float) -> pulp.LpSolver:
    """One thread: what else runs on the machine must not decide the answer. No gap is tolerated."""
    chosen = name or available_backends()[0]
    limit = None if np.isinf(time_limit_s) else max(time_limit_s, 0.1)
    if chosen == "HiGHS":
        return pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=1e-9, threads=1, timeLimit=limit)
    with warnings.catch_warnings():
        # pulp 3 warns that version 4 will bring no CBC; pyproject.toml keeps us below 4 for its sake.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, threads=1, timeLimit=limit)
