"""A guess without knowledge: the least that a predictor must pass, and the adversary in tests of prefetching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.predictor import Ints, Probabilities, RouterShape, Training, as_probabilities
from predictors.streams import ByPosition


class Random(ByPosition):
    """K experts for every token and layer, drawn from the seed, the position in the stream and the layer."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, shape: RouterShape, seed: int = 0) -> None:
        super().__init__()
        self._shape = shape
        self._seed = seed

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls(training.shape, training.seed)

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        return cls(shape, int(arrays["seed"][0]))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"seed": np.array([self._seed])}

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        return as_probabilities(2 * self._noise(layer, streams, 0), self._shape.top_k)

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        return self._noise(layer, streams, 1)

    def _noise(self, layer: int, streams: Ints, what: int) -> npt.NDArray[np.float32]:
        """[T, E] in 0..1."""
        keys = (self._position.data[streams] + 1).astype(np.uint64)[:, None]
        for part in (self._seed, what, layer, np.arange(self._shape.num_experts)):
            keys = _mixed(keys + np.asarray(part, dtype=np.uint64))
        return np.asarray((keys >> np.uint64(40)) / 2**24, dtype=np.float32)


def _mixed(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits (the finaliser of SplitMix64): a row's hash does not depend on the other rows."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = keys ^ (keys >> np.uint64(31))
    return mixed


METHOD = Random
