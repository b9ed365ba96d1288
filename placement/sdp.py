"""A semidefinite bound on the traffic that can stay on its device, for a chain of layers.

Write X[u, v] = 1 where experts u and v share a device. X is positive semidefinite, 1 on the diagonal, 0..1
elsewhere, and every row meets E/G experts of each layer. Any layout gives such an X, so the largest
weighted sum over them bounds every layout. Only neighbouring layers meet in the objective, so X need only
exist for each pair of layers, agreeing where the pairs overlap (chordal completion); that makes the
matrices 2E x 2E. It is the relaxation of graph partitioning of Donath-Hoffman and Karisch-Rendl, solved
by ADMM as in Wen-Goldfarb-Yin (2010).

The bound does not rest on convergence: for any multipliers it is a sum of an eigenvalue problem and of a
sorting problem (`_Multipliers.bound`), both solved exactly. The iteration only makes it small.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from placement.topology import Floats

ROUNDING = 1e-9
"""Added to every bound for the errors of eigenvalues in float64."""
MOST_ITERATIONS = 3000


@dataclass(frozen=True)
class PairTraffic:
    """What the bound needs of a problem. All devices hold the same number of experts of every layer."""

    weights: Floats
    """[L-1, E, E]"""
    groups: int
    """G: devices, or nodes."""
    load: Floats
    """[L, E] shares of each layer's load."""
    most_load: float
    """Most of a layer's load on one device, as a share; infinite where there is no limit."""

    @property
    def room(self) -> int:
        """Experts of a layer on one device."""
        return int(self.weights.shape[1] // self.groups)


def kept_at_most(traffic: PairTraffic, time_limit_s: float) -> float:
    """Share of all traffic that stays on its device in any layout, at most."""
    state = _Admm(traffic)
    start = time.monotonic()
    best = np.inf
    since_better = 0
    for iteration in range(1, MOST_ITERATIONS + 1):
        state.step()
        # A step or a bound of large problems takes seconds: stop while there is time for one more of each.
        used_s = time.monotonic() - start
        last = used_s * (1 + 2 / iteration) > time_limit_s or iteration == MOST_ITERATIONS
        if last or iteration % 20 == 0:
            value = state.multipliers.bound(traffic)
            since_better = 0 if value < best - 1e-6 else since_better + 1
            best = min(best, value)
            if last or since_better >= 10:
                break
            state.rebalance()
    return best + ROUNDING


@dataclass
class _Multipliers:
    """Prices of the constraints that tie everything together; every choice of them gives a valid bound."""

    pair: Floats
    """[L-1, 2E, 2E] of "the semidefinite matrix of a pair of layers equals X there"."""
    within: Floats
    """[L, E] of "the layer's experts that share a device with u are not overloaded", u of the same layer."""
    after: Floats
    """[L-1, E] the same for the next layer's experts, u of the earlier one."""
    before: Floats
    """[L-1, E] the same for the earlier layer's experts, u of the next one."""

    def bound(self, traffic: PairTraffic) -> float:
        """The Lagrangian's maximum: over X row by row, over each semidefinite matrix by its eigenvalues."""
        size = traffic.weights.shape[1]
        cross, same = self.coefficients(traffic)
        room = traffic.room
        rows = np.sort(cross, 2)[:, :, size - room :].sum((1, 2))
        columns = np.sort(cross, 1)[:, size - room :].sum((1, 2))
        diagonal = np.einsum("lii->l", same).sum()
        off = same.copy()
        np.einsum("lii->li", off)[:] = -np.inf
        others = np.sort(off, 2)[:, :, size - room + 1 :].sum()
        return float(
            np.minimum(rows, columns).sum() + diagonal + others + self._spectral(traffic) + self._limits(traffic)
        )

    def coefficients(self, traffic: PairTraffic) -> tuple[Floats, Floats]:
        """What an entry of X between layers [L-1, E, E], and within a layer [L, E, E], is worth."""
        size = traffic.weights.shape[1]
        cross = traffic.weights - 2 * self.pair[:, :size, size:]
        same = np.zeros((traffic.load.shape[0], size, size))
        same[:-1] -= self.pair[:, :size, :size]
        same[1:] -= self.pair[:, size:, size:]
        if np.isfinite(traffic.most_load):
            cross = cross - self.after[:, :, None] * traffic.load[1:, None, :]
            cross = cross - traffic.load[:-1, :, None] * self.before[:, None, :]
            same = same - self.within[:, :, None] * traffic.load[:, None, :]
            same = (same + same.transpose(0, 2, 1)) / 2
        return cross, same

    def _spectral(self, traffic: PairTraffic) -> float:
        """Each pair's matrix is 1/G everywhere plus G - 1 eigenvalues of 2E/G, orthogonal to each layer's ones."""
        values = np.linalg.eigvalsh(_centred(self.pair))
        groups, room = traffic.groups, 2 * traffic.room
        return float(self.pair.sum() / groups + room * values[:, values.shape[1] - groups + 1 :].sum())

    def _limits(self, traffic: PairTraffic) -> float:
        if not np.isfinite(traffic.most_load):
            return 0.0
        return float(traffic.most_load * (self.within.sum() + self.after.sum() + self.before.sum()))


class _Admm:
    """Alternates between X, entry by entry, and the semidefinite matrices V, by eigenvectors."""

    def __init__(self, traffic: PairTraffic) -> None:
        self.traffic = traffic
        pairs, size, _ = traffic.weights.shape
        self.size = size
        self.multipliers = _Multipliers(
            np.zeros((pairs, 2 * size, 2 * size)),
            np.zeros((pairs + 1, size)),
            np.zeros((pairs, size)),
            np.zeros((pairs, size)),
        )
        self.semidefinite = np.full((pairs, 2 * size, 2 * size), 1 / traffic.groups)
        self.x = self.semidefinite.copy()
        self.rate = float(np.linalg.norm(traffic.weights)) / np.sqrt(pairs * 4 * size * traffic.room) * 4
        self.primal = self.dual = 0.0

    def step(self) -> None:
        before = self.x
        self.x = self._entries()
        if np.isfinite(self.traffic.most_load):
            self._price_loads()
        self.semidefinite = self._project(self.x + self.multipliers.pair / self.rate)
        residual = self.semidefinite - self.x
        self.multipliers.pair -= self.rate * residual
        self.primal = float(np.linalg.norm(residual))
        self.dual = self.rate * float(np.linalg.norm(self.x - before))

    def rebalance(self) -> None:
        """Step sizes that let both residuals fall together."""
        ratio = self.primal * self.rate / max(self.dual, 1e-300)
        self.rate *= float(np.clip(np.sqrt(ratio), 0.7, 1.4))

    def _entries(self) -> Floats:
        """X for given V and multipliers, as one matrix per pair of layers, overlaps averaged."""
        size = self.size
        cross_worth, same_worth = self.multipliers.coefficients(self.traffic)
        cross = np.clip(self.semidefinite[:, :size, size:] + cross_worth / (2 * self.rate), 0, 1)
        total = np.zeros_like(same_worth)
        count = np.zeros((total.shape[0], 1, 1))
        total[:-1] += self.semidefinite[:, :size, :size]
        total[1:] += self.semidefinite[:, size:, size:]
        count[:-1] += 1
        count[1:] += 1
        same = np.clip((total + same_worth / self.rate) / count, 0, 1)
        np.einsum("lii->li", same)[:] = 1
        return np.block([[same[:-1], cross], [cross.transpose(0, 2, 1), same[1:]]])

    def _price_loads(self) -> None:
        """Overloaded rows become dearer, the others cheaper."""
        size, load, most = self.size, self.traffic.load, self.traffic.most_load
        cross = self.x[:, :size, size:]
        same = np.concatenate([self.x[:, :size, :size], self.x[-1:, size:, size:]])
        rate = self.rate * self.traffic.weights.shape[1] * LOAD_RATE
        prices = self.multipliers
        prices.within = np.maximum(0, prices.within + rate * (np.einsum("lij,lj->li", same, load) - most))
        prices.after = np.maximum(0, prices.after + rate * (np.einsum("lij,lj->li", cross, load[1:]) - most))
        prices.before = np.maximum(0, prices.before + rate * (np.einsum("lij,li->lj", cross, load[:-1]) - most))

    def _project(self, matrices: Floats) -> Floats:
        """The nearest matrices that are 1/G everywhere plus something centred with G - 1 eigenvalues' worth of 2E/G."""
        groups, room = self.traffic.groups, 2.0 * self.traffic.room
        values, vectors = np.linalg.eigh(_centred(matrices))
        values = _capped(values, room, room * (groups - 1))
        return np.asarray((vectors * values[:, None, :]) @ vectors.transpose(0, 2, 1) + 1 / groups)


LOAD_RATE = 0.5
"""Step of the load prices relative to the others'; larger oscillates."""


def _centred(matrices: Floats) -> Floats:
    """[., 2E, 2E] with the mean over each layer's half taken off rows and columns."""
    pairs, width, _ = matrices.shape
    halves = matrices.reshape(pairs, 2, width // 2, width)
    rows = (halves - halves.mean(2, keepdims=True)).reshape(pairs, width, 2, width // 2)
    return np.asarray((rows - rows.mean(3, keepdims=True)).reshape(pairs, width, width))


def _capped(values: Floats, most: float, total: float) -> Floats:
    """The nearest [., N] with entries in 0..most that add up to `total`, by bisection on a shift."""
    low, high = values.min(1) - most, values.max(1)
    for _ in range(60):
        shift = (low + high) / 2
        too_large = np.clip(values - shift[:, None], 0, most).sum(1) > total
        low, high = np.where(too_large, shift, low), np.where(too_large, high, shift)
    return np.asarray(np.clip(values - high[:, None], 0, most))
