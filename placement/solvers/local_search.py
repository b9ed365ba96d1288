"""Many starts, coordinate descent, recombination, then pairs of devices and perturbation until nothing helps.

Each step is a large neighbourhood searched exactly: a layer (linear assignment), the pool's layers
(dynamic programming over switches), two devices over all layers (dynamic programming over splits).
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from placement.cost import Layout
from placement.descent import chain_pass, descend, objective
from placement.fill import fill, random_layer
from placement.layer import LayerCosts
from placement.pairs import improve_pair
from placement.problem import PlacementProblem
from placement.recombine import recombine
from placement.run import Run
from placement.topology import Ints

POOL = 24
"""Layouts kept for recombination."""


def solve(problem: PlacementProblem, run: Run) -> Layout:
    """`run.effort` starts, as many rounds of perturbation; deterministic by seed where time does not run out."""
    search = Search(problem, run)
    search.start_from_known()
    search.start(run.effort)
    search.recombine()
    search.polish_pairs()
    search.perturb(run.effort)
    return search.best


class Search:
    """A pool of layouts and the ways to improve it. The pool is sorted, best first."""

    def __init__(self, problem: PlacementProblem, run: Run) -> None:
        self.problem, self.run = problem, run
        self.costs = LayerCosts(problem)
        self.rng = run.rng
        self.pool: list[tuple[float, Ints]] = []

    @property
    def best(self) -> Layout:
        return Layout(self.pool[0][1])

    def add(self, device_of: Ints, what: str) -> bool:
        """Put a layout into the pool; whether it is the new best."""
        value = objective(self.costs, device_of)
        if any(abs(value - other) < 1e-12 for other, _ in self.pool):
            return False
        is_best = not self.pool or value < self.pool[0][0]
        self.pool = sorted([*self.pool, (value, device_of)], key=lambda entry: entry[0])[:POOL]
        if is_best:
            self.run.offer(Layout(device_of), what)
        return is_best

    def start_from_known(self) -> None:
        """What other solvers found; and the plan in force, as with a price on moves the best is often near."""
        if self.run.best is not None:
            self.add(self.descend(self.run.best.device_of), "best so far, descended")
        if self.problem.current.size:
            current = fill(self.problem, self.problem.current)
            self.add(current, "current plan")
            self.add(self.descend(current), "current plan, descended")

    def start(self, count: int) -> None:
        """Chains grown from random layers at random places, each descended."""
        for number in range(count):
            layer = int(self.rng.integers(self.problem.num_layers))
            grown = chain_pass(self.costs, layer, random_layer(self.problem, layer, self.rng))
            self.add(self.descend(grown), f"start {number + 1} of {count}")
            if self.run.out_of_time:
                break

    def descend(self, device_of: Ints) -> Ints:
        return descend(self.costs, device_of, lambda: self.run.out_of_time)

    def recombine(self, rounds: int = 5) -> None:
        """Mix the pool's layers and descend, until that gives nothing new."""
        for _ in range(rounds):
            if self.run.out_of_time or len(self.pool) < 2:
                break
            mixed = recombine(self.costs, [layout for _, layout in self.pool])
            if not self.add(self.descend(mixed), "recombination"):
                break

    def polish_pairs(self) -> None:
        """Pairs of devices in random order, until a whole round changes nothing."""
        best = self.pool[0][1]
        self.add(self.descend(self._pairs_to_rest(best)), "device pairs")

    def _pairs_to_rest(self, device_of: Ints) -> Ints:
        pairs = list(combinations(range(self.problem.num_devices), 2))
        untouched = 0
        while untouched < len(pairs):
            for index in self.rng.permutation(len(pairs)):
                if self.run.out_of_time or untouched >= len(pairs):
                    return device_of
                new = improve_pair(self.costs, device_of, *pairs[index])
                better = objective(self.costs, new) < objective(self.costs, device_of) - 1e-12
                device_of, untouched = (new, 0) if better else (device_of, untouched + 1)
                if better:
                    self.run.offer(Layout(device_of), "device pairs")
        return device_of

    def perturb(self, rounds: int) -> None:
        """Scramble a stretch of layers of the best layout, descend, recombine with the pool."""
        for number in range(rounds):
            if self.run.out_of_time:
                break
            device_of = self.pool[0][1].copy()
            length = int(self.rng.integers(1, max(2, self.problem.num_layers // 2)))
            first = int(self.rng.integers(self.problem.num_layers - length + 1))
            for layer in range(first, first + length):
                device_of[layer] = self._scramble(device_of[layer], layer)
            self.add(self.descend(device_of), f"perturbation {number + 1} of {rounds}")
            self.recombine(1)

    def _scramble(self, devices: Ints, layer: int) -> Ints:
        """Random swaps among the free experts of a layer."""
        devices = devices.copy()
        free = np.flatnonzero(self.problem.pinned[layer] < 0)
        if free.size > 1:
            for _ in range(max(1, free.size // 8)):
                i, j = self.rng.choice(free, 2, replace=False)
                devices[i], devices[j] = devices[j], devices[i]
        return devices
