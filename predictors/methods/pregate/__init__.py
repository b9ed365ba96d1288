"""A small router of its own that predicts every layer of a token before the first one.

Read-ME (arXiv 2410.19123) trains a router apart from the backbone so that the whole path is known beforehand, and
changes the model for it; ExpertFlow (arXiv 2410.17954) trains a predictor beside an unchanged model. This is the
second kind, distilled from recorded routes: what the model's own routers chose is the target, and they still decide.

    h = silu(token + last token + sum of last routes + averages A)       [R], learnt vectors; only routes are required
    P(expert of any layer) = softmax per layer of h W + b + s averages

Cost per token: L K rows of R are added up, then R L E + L E R multiplications, once for all layers.

Shape alphabet: T tokens, N tokens of a trace, R width, V vocabulary, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.context import RATES, ByContext
from predictors.methods.pregate.layout import NAMES, SHORT, WIDTH
from predictors.predictor import Ints, Probabilities, RouterShape, Training
from predictors.streams import UNKNOWN, Rows


class Pregate(ByContext):
    """The trained router; one small network in numpy."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, shape: RouterShape, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """`weights`: routes [L E + 1, R], averages [L E, R], out [R, L E], bias [L E], habit [len(RATES), L E];
        token and last_token [V + 1, R], V = 0 where the trace held no token ids."""
        super().__init__(shape)
        self._weights = {name: np.asarray(weights[name], dtype=np.float32) for name in NAMES}
        # UNKNOWN is -1: in this and in the tables of tokens it picks the last row, which adds nothing.
        by_layer = self._weights["routes"][:-1].reshape(shape.num_layers, shape.num_experts, WIDTH)
        self._routes = np.pad(by_layer, ((0, 0), (0, 1), (0, 0)))
        self._layers = np.arange(shape.num_layers)[:, None]
        self._tokens = Rows((2,), np.int64, UNKNOWN)
        """The current and the last token of each stream."""
        self._likely = Rows((shape.num_layers, shape.num_experts), np.float32)

    @classmethod
    def fit(cls, training: Training) -> Self:
        from predictors.methods.pregate.training import train

        return cls(training.shape, train(training))

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        expected = (shape.num_layers * shape.num_experts + 1, WIDTH)
        if arrays["routes"].shape != expected:
            raise ValueError(f"routes has shape {arrays['routes'].shape}, not {expected}")
        return cls(shape, arrays)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {name: array.astype(np.float16) for name, array in self._weights.items()}

    def begin(self, streams: Ints) -> None:
        super().begin(streams)
        self._tokens.reset(streams)
        self._likely.reset(streams)

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        super().step(streams, token_ids)
        self._tokens.data[streams, 1] = self._tokens.data[streams, 0]
        self._tokens.data[streams, 0] = UNKNOWN if token_ids is None else token_ids
        self._likely.data[streams] = self._predict(streams)

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        likely: Probabilities = self._likely.data[streams, layer]
        return likely

    def _predict(self, streams: Ints) -> npt.NDArray[np.float32]:
        """[T, L, E]."""
        w, shape = self._weights, self._shape
        averages = self._context.all_averages(streams).reshape(len(streams), len(RATES), -1)
        tokens = np.minimum(self._tokens.data[streams], len(w["token"]) - 1)
        h = self._routes[self._layers, self._context.routes.previous[streams]].sum(axis=(1, 2))
        h += averages[:, SHORT] @ w["averages"] + w["token"][tokens[:, 0]] + w["last_token"][tokens[:, 1]]
        h /= 1 + np.exp(-h)
        scores = h @ w["out"] + w["bias"] + (averages * w["habit"]).sum(axis=1)
        scores = scores.reshape(len(streams), shape.num_layers, shape.num_experts)
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        # Trained against targets of 1 / K, a share of 1 / K means certainty.
        shares *= shape.top_k / shares.sum(axis=2, keepdims=True)
        likely: npt.NDArray[np.float32] = np.minimum(shares, 1)
        return likely


METHOD = Pregate
