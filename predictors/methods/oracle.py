"""The truth, told beforehand: the bound from above of whatever uses predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.averages import next_use_values
from predictors.methods.transition import DISCOUNT
from predictors.predictor import FUTURE, Floats, Ints, Probabilities, RouterShape, Training
from predictors.streams import Rows, multi_hot
from predictors.trace import RoutingTrace


class Oracle:
    """Knows the routes of every stream; `reveal` them after `begin`."""

    needs: ClassVar[frozenset[str]] = frozenset({FUTURE})

    def __init__(self, shape: RouterShape) -> None:
        self._shape = shape
        self._position = Rows((), np.int64, -1)
        self._routes: dict[int, npt.NDArray[Any]] = {}
        self._soon: dict[int, npt.NDArray[np.float32]] = {}

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls(training.shape)

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        return cls(shape)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    def reveal(self, stream: int, future: RoutingTrace) -> None:
        """`future`: the one sequence that `stream` is going to be."""
        self._routes[stream] = future.ids.astype(np.int32)
        self._soon[stream] = next_use_values(future, DISCOUNT)

    def begin(self, streams: Ints) -> None:
        self._position.reset(streams)

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        self._position.data[streams] += 1

    def observe(
        self, layer: int, streams: Ints, ids: Ints, weights: Floats | None = None, hidden: Any | None = None
    ) -> None:
        pass

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        ids = np.stack([self._routes[s][self._position.data[s], layer] for s in streams.tolist()])
        return multi_hot(ids, self._shape.num_experts)

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        return np.stack([self._soon[s][self._position.data[s], layer] for s in streams.tolist()])


METHOD = Oracle
