"""Affinity between layers and between tokens: which experts follow from the routes seen so far, by least squares.

Experts of successive layers depend on one another (ExFlow, arXiv 2401.08383, places experts by it); as a predictor it
costs no arithmetic on hidden states. One layer of context is a Markov chain; here the last eight layers, the
previous token and the stream's averages are weighed together (`predictors/context.py`), for each distance apart.

Cost per token and forecast: (8 + 4) K + 2 E rows of E weights are added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.averages import next_use_values
from predictors.context import ByContext, Evidence, Linear, window_of
from predictors.predictor import Ints, Probabilities, RouterShape, Training, as_probabilities
from predictors.streams import UNKNOWN

DISTANCES = (1, 2, 3, 4, 6, 8)
"""Fitted lookaheads. One in between is answered by the next larger, without the newest layers; one beyond, by what is
known before the token."""
DISCOUNT = 0.8
"""Per token, of `upcoming`."""
Key = tuple[int, int]
"""(layer, newest layer known)."""


class Transition(ByContext):
    """Least squares over the routes of this and the previous token."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, shape: RouterShape, next_layers: Mapping[Key, Linear], reuse: Mapping[int, Linear]) -> None:
        super().__init__(shape)
        self._next = next_layers
        self._reuse = reuse

    @classmethod
    def fit(cls, training: Training) -> Self:
        shape, evidence = training.shape, Evidence(training.trace)
        soon = next_use_values(training.trace, DISCOUNT)[evidence.rows]
        next_layers: dict[Key, Linear] = {}
        reuse: dict[int, Linear] = {}
        for layer in range(shape.num_layers):
            newest = newest_known(layer)
            windows = [window_of(layer, n, shape.num_layers) for n in (*newest, layer)]
            fitted = evidence.fit(windows, [evidence.used(layer), soon[:, layer]])
            next_layers.update({(layer, n): used for n, (used, _) in zip(newest, fitted, strict=False)})
            reuse[layer] = fitted[-1][1]
        return cls(shape, next_layers, reuse)

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        def read(name: str, layer: int, newest: int) -> Linear:
            return Linear.unpack(window_of(layer, newest, shape.num_layers), arrays[name], shape.num_experts)

        layers = range(shape.num_layers)
        keys = [(layer, newest) for layer in layers for newest in newest_known(layer)]
        next_layers = {key: read(f"next.{key[0]}.{key[1]}", *key) for key in keys}
        return cls(shape, next_layers, {layer: read(f"reuse.{layer}", layer, layer) for layer in layers})

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        named = {f"next.{layer}.{newest}": linear.packed() for (layer, newest), linear in self._next.items()}
        return named | {f"reuse.{layer}": linear.packed() for layer, linear in self._reuse.items()}

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        newest = self._context.routes.newest[streams]
        out = np.empty((len(streams), self._shape.num_experts), dtype=np.float32)
        for known in set(newest.tolist()):
            rows = np.flatnonzero(newest == known)
            usable = next(n for n in newest_known(layer) if n <= known)
            out[rows] = self._next[layer, usable].forecast(self._context, streams[rows])
        return as_probabilities(out, self._shape.top_k)

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        return np.clip(self._reuse[layer].forecast(self._context, streams), 0, 1)


def newest_known(layer: int) -> list[int]:
    """The newest layers for which `layer` has a fit, nearest first; the last is UNKNOWN."""
    return [*(layer - d for d in DISTANCES if d <= layer), UNKNOWN]


METHOD = Transition
