"""Popularity: how often an expert was used in training traces, and by this stream lately.

The baseline of every system that pins or prefetches popular experts (Fiddler, KTransformers); the stream's own
average adds the locality that LFU and LRU caches live on.

Cost per token and forecast: a weighted sum of three rows of E.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.context import ByContext
from predictors.predictor import Ints, Probabilities, RouterShape, Training, as_probabilities

STREAM_WEIGHTS = (0.3, 0.5)
"""Of the stream's averages at context.RATES; the rest is the trace's. Not tuned."""


class Frequency(ByContext):
    """Global popularity and the stream's averages, mixed."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, shape: RouterShape, popularity: npt.NDArray[np.floating]) -> None:
        """`popularity` [L, E]: uses per token."""
        super().__init__(shape)
        self._popularity = popularity.astype(np.float32)
        self._weights = np.array(STREAM_WEIGHTS, dtype=np.float32)

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls(training.shape, training.trace.popularity())

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        popularity = arrays["popularity"]
        if popularity.shape != (shape.num_layers, shape.num_experts):
            raise ValueError(f"popularity has shape {popularity.shape}")
        return cls(shape, popularity)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"popularity": self._popularity}

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        return as_probabilities(self._mixed(self._context.averages(layer, streams), layer), self._shape.top_k)

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        averages = self._context.averages_with_current(layer, streams)
        return np.clip(self._mixed(averages, layer), 0, 1)

    def _mixed(self, averages: npt.NDArray[np.float32], layer: int) -> npt.NDArray[np.float32]:
        """averages [T, R, E] -> [T, E]; what a young stream's averages lack is the trace's."""
        by_stream = np.tensordot(averages, self._weights, axes=([1], [0]))
        seen = (averages.sum(axis=2) / self._shape.top_k) @ self._weights
        mixed: npt.NDArray[np.float32] = by_stream + (1 - seen)[:, None] * self._popularity[layer]
        return mixed


METHOD = Frequency
