"""The true routes, told beforehand: the most that any use of predictions can reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.averages import next_use_values
from predictors.methods.transition import DISCOUNT
from predictors.predictor import FUTURE, Ints, Probabilities, RouterShape, Training
from predictors.streams import ByPosition, multi_hot
from predictors.trace import RoutingTrace


class Oracle(ByPosition):
    """Knows the routes of every stream; `reveal` them after `begin`."""

    needs: ClassVar[frozenset[str]] = frozenset({FUTURE})

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self._shape = shape
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

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        ids = np.stack([self._routes[s][self._position.data[s], layer] for s in streams.tolist()])
        return multi_hot(ids, self._shape.num_experts)

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        return np.stack([self._soon[s][self._position.data[s], layer] for s in streams.tolist()])


METHOD = Oracle
