"""A wish for every expert made into a layout that keeps pins and slots."""

from __future__ import annotations

import numpy as np

from placement.problem import PlacementProblem
from placement.topology import Ints


def fill(problem: PlacementProblem, wish: Ints) -> Ints:
    """[L, E] devices: the pinned one, else the wished one, else the next with a free slot."""
    return np.stack([_fill_layer(problem, layer, wish[layer]) for layer in range(problem.num_layers)])


def _fill_layer(problem: PlacementProblem, layer: int, wish: Ints) -> Ints:
    devices = problem.pinned[layer].copy()
    free = problem.slots - np.bincount(devices[devices >= 0], minlength=problem.num_devices)
    for expert in np.flatnonzero(devices < 0):
        around = (wish[expert] + np.arange(problem.num_devices)) % problem.num_devices
        devices[expert] = around[np.argmax(free[around] > 0)]
        free[devices[expert]] -= 1
    return np.asarray(devices)


def random_layer(problem: PlacementProblem, layer: int, rng: np.random.Generator) -> Ints:
    """[E] a random layer that keeps pins and slots."""
    devices = problem.pinned[layer].copy()
    slots = np.repeat(
        np.arange(problem.num_devices),
        problem.slots - np.bincount(devices[devices >= 0], minlength=problem.num_devices),
    )
    free = devices < 0
    devices[free] = rng.permutation(slots)[: int(free.sum())]
    return np.asarray(devices)
