"""A guess that knows nothing: the bound from below, and the adversary in tests of whatever uses predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.predictor import Floats, Ints, Probabilities, RouterShape, Training, as_probabilities
from predictors.streams import Rows


class Random:
    """K experts for every token and layer, drawn from the seed, the position in the stream and the layer."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, shape: RouterShape, seed: int = 0) -> None:
        self._shape = shape
        self._seed = seed
        self._position = Rows((), np.int64)

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls(training.shape, training.seed)

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        return cls(shape, int(arrays["seed"][0]))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {"seed": np.array([self._seed])}

    def begin(self, streams: Ints) -> None:
        self._position.reset(streams)

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        self._position.data[streams] += 1

    def observe(
        self, layer: int, streams: Ints, ids: Ints, weights: Floats | None = None, hidden: Any | None = None
    ) -> None:
        pass

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        return as_probabilities(2 * self._noise(layer, streams, 0), self._shape.top_k)

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        return self._noise(layer, streams, 1)

    def _noise(self, layer: int, streams: Ints, what: int) -> npt.NDArray[np.float32]:
        """[T, E] in 0..1."""
        rows = [
            np.random.default_rng((self._seed, what, layer, position)).random(self._shape.num_experts, np.float32)
            for position in self._position.data[streams].tolist()
        ]
        return np.stack(rows) if rows else np.zeros((0, self._shape.num_experts), dtype=np.float32)


METHOD = Random
