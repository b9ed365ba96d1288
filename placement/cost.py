"""What a layout costs, computed from nothing but the problem and the layout: no solver's bookkeeping is trusted.

Without replicas the traffic is a sum over transitions. With replicas it follows the tokens: where a token
is after a layer decides which copy it takes next, so a flow over (expert, device) is pushed through the
layers. The flow assumes that where a token is depends on its expert and not on how it came there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from placement.problem import PlacementProblem
from placement.topology import Floats, Ints

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PlanCost:
    """Shares are of all transitions counted, so they lie in 0..1."""

    total: float
    """The objective: traffic plus priced imbalance plus priced migration."""
    traffic: float
    """Mean hop cost per transition; with hops of cost 1 it equals `cross_device`."""
    cross_device: float
    """Share of transitions that leave the device."""
    cross_node: float
    """Share of transitions that leave the node."""
    balance_mean: float
    """Mean over layers of the busiest device's load over its fair share; 1 is perfect."""
    balance_worst: float
    """The same in the worst layer."""
    violation: float
    """Sum over layers and devices of load above the limit, in units of fair share; 0 is feasible."""
    moved: int
    """Experts that are not on a device that holds them in `current`."""

    @property
    def feasible(self) -> bool:
        return self.violation <= TOLERANCE

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: the balance limit first, then the objective."""
        return (0.0 if self.feasible else self.violation, self.total)

    def to_json(self) -> dict[str, float]:
        return asdict(self)


TOLERANCE = 1e-9
"""Slack on a balance limit, for sums of floats taken in different orders."""


def no_replicas() -> Ints:
    return np.zeros((0, 3), np.int64)


@dataclass(frozen=True)
class Layout:
    """Where the experts are. Example, 1 layer, 4 experts, 2 devices, expert 0 on both:
    device_of [[0, 0, 1, 1]], replicas [[0, 0, 1]] (layer, expert, device).
    """

    device_of: Ints
    """[L, E] the device of each expert's first copy."""
    replicas: Ints = field(default_factory=no_replicas)
    """[R, 3] further copies: layer, expert, device."""


Hosts = Bools
"""[L, E, G] whether a device holds an expert."""


def hosts_of(layout: Layout, num_devices: int) -> Hosts:
    """A layout as an array."""
    hosts = np.zeros((*layout.device_of.shape, num_devices), bool)
    np.put_along_axis(hosts, layout.device_of[..., None], True, 2)
    hosts[tuple(layout.replicas.T)] = True
    return hosts


def evaluate(problem: PlacementProblem, layout: Layout) -> PlanCost:
    """What a layout costs under a problem's settings."""
    hosts = hosts_of(layout, problem.num_devices)
    traffic, load = follow_tokens(problem, hosts)
    busy = load / problem.topology.fair_share
    moved = count_moved(problem, hosts)
    nodes = problem.topology.node_of
    price = problem.balance_price * float(np.mean(busy.max(1) - 1)) + _move_price(problem, moved)
    hop_cost = float((traffic * problem.topology.hop_costs).sum())
    return PlanCost(
        total=hop_cost + price,
        traffic=hop_cost,
        cross_device=float(traffic.sum() - np.trace(traffic)),
        cross_node=float(traffic[nodes[:, None] != nodes[None, :]].sum()),
        balance_mean=float(busy.max(1).mean()),
        balance_worst=float(busy.max()),
        violation=excess(problem, busy),
        moved=moved,
    )


def excess(problem: PlacementProblem, busy: Floats) -> float:
    """How far loads `busy` [..., G], in units of fair share, are above the limit, in total."""
    if problem.max_imbalance is None:
        return 0.0
    return float(np.clip(busy - problem.max_imbalance - TOLERANCE, 0, None).sum())


def count_moved(problem: PlacementProblem, hosts: Bools) -> int:
    """Experts with no copy where `current` has them."""
    if not problem.current.size:
        return 0
    return int((~np.take_along_axis(hosts, problem.current[..., None], 2)).sum())


def _move_price(problem: PlacementProblem, moved: int) -> float:
    return problem.migration_price * moved / problem.load.size


def device_traffic(problem: PlacementProblem, layout: Layout) -> Floats:
    """[G, G] share of all transitions that go from one device to another."""
    return follow_tokens(problem, hosts_of(layout, problem.num_devices))[0]


def device_load(problem: PlacementProblem, layout: Layout) -> Floats:
    """[L, G] each device's share of a layer's load."""
    return follow_tokens(problem, hosts_of(layout, problem.num_devices))[1]


def follow_tokens(problem: PlacementProblem, hosts: Bools) -> tuple[Floats, Floats]:
    """Traffic [G, G] in shares of all transitions, and device load [L, G] in shares of each layer's load."""
    traffic = np.zeros((problem.num_devices, problem.num_devices))
    load = np.zeros((problem.num_layers, problem.num_devices))
    position = hosts[0] / hosts[0].sum(1, keepdims=True)
    load[0] = problem.load_share[0] @ position
    for layer, weights in enumerate(problem.weights):
        arriving = weights.T @ position
        step = _routes(problem, hosts[layer + 1])
        traffic += np.einsum("jg,jgh->gh", arriving, step) if step.ndim == 3 else arriving.T @ step
        position = _positions(arriving, step, hosts[layer + 1])
        load[layer + 1] = problem.load_share[layer + 1] @ position
    return traffic, load


def _routes(problem: PlacementProblem, hosts: Bools) -> Floats:
    """To which copy a token goes: [E, G] where it does not depend on where it is, else [E, G from, G to]."""
    copies = hosts.sum(1)
    if copies.max() == 1 or problem.replica_routing == "even":
        return np.asarray(hosts / copies[:, None], np.float64)
    costs = np.where(hosts[:, None, :], problem.topology.hop_costs[None], np.inf)
    cheapest = costs == costs.min(2, keepdims=True)
    return np.asarray(cheapest / cheapest.sum(2, keepdims=True), np.float64)


def _positions(arriving: Floats, step: Floats, hosts: Bools) -> Floats:
    """[E, G] where the tokens of each expert are after the hop; of experts without tokens: spread over the copies."""
    if step.ndim == 2:
        return step
    masses = np.einsum("jg,jgh->jh", arriving, step)
    totals = masses.sum(1, keepdims=True)
    return np.asarray(
        np.where(totals > 0, masses / np.where(totals > 0, totals, 1), hosts / hosts.sum(1, keepdims=True))
    )
