"""Trajectory matching: what did tokens do that were routed like this one so far, after tokens like the last one?

MoE-Infinity (arXiv 2401.14361) looks for the stored request with the most similar activations; FineMoE (EuroSys '26)
matches a token's gate outputs layer by layer against about a thousand stored maps. Here stored tokens of a trace are
matched by the experts they share with the running token, in the layers seen so far, and with the token before it.

Cost per token and layer: K rows of M shares, M the stored tokens; per forecast M E multiplications.

Shape alphabet: T rows, M stored tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from predictors.averages import next_use_values
from predictors.methods.transition import DISCOUNT
from predictors.predictor import Floats, Ints, Probabilities, RouterShape, Training, as_probabilities
from predictors.streams import UNKNOWN, Rows, multi_hot

STORED_TOKENS = 4096
PREVIOUS_WEIGHT = 0.5
"""Of an expert that the token before shares, where one of this token counts 1 over FADE."""
FADE = 0.9
"""Per layer: the newest layers say most about the next."""
SHARPNESS = 0.6
"""The weight of a stored token grows by e ** this with each expert shared. Not tuned, as the other constants here."""
SMOOTHING = 0.1
"""Of popularity, mixed in: no match is certain."""


class SimilarRequest:
    """A weighted vote of stored tokens."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, shape: RouterShape, stored: Mapping[str, npt.NDArray[Any]]) -> None:
        """`stored`: ids [M, L, K] and previous [M, L, K], UNKNOWN before a sequence; soon [M, L, E]: next use values;
        popularity [L, E]."""
        self._shape = shape
        self._stored = stored
        self._used = multi_hot(stored["ids"], shape.num_experts).transpose(1, 0, 2).copy()
        self._soon = stored["soon"].astype(np.float32).transpose(1, 0, 2).copy()
        # UNKNOWN is -1: it picks the last row, which is like no stored token.
        self._like_this = _by_expert(self._used)
        previous = multi_hot(stored["previous"], shape.num_experts).transpose(1, 0, 2)
        self._like_previous = _by_expert(previous)
        self._match = Rows((len(stored["ids"]),), np.float32)
        self._next_match = Rows((len(stored["ids"]),), np.float32)

    @classmethod
    def fit(cls, training: Training) -> Self:
        trace = training.trace
        keep = np.arange(0, trace.num_tokens, -(-trace.num_tokens // STORED_TOKENS))
        ids = trace.ids.astype(np.int16)
        previous = np.roll(ids, 1, axis=0)
        previous[trace.seq_offsets[:-1]] = UNKNOWN
        soon = next_use_values(trace, DISCOUNT)[keep].astype(np.float16)
        popularity = trace.popularity().astype(np.float32)
        return cls(
            training.shape, {"ids": ids[keep], "previous": previous[keep], "soon": soon, "popularity": popularity}
        )

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        stored = {name: arrays[name] for name in ("ids", "previous", "soon", "popularity")}
        if stored["ids"].shape[1:] != (shape.num_layers, shape.top_k):
            raise ValueError(f"stored tokens have shape {stored['ids'].shape}")
        return cls(shape, stored)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return dict(self._stored)

    def begin(self, streams: Ints) -> None:
        self._match.reset(streams)
        self._next_match.reset(streams)

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        self._match.data[streams] = self._next_match.data[streams]
        self._next_match.data[streams] = 0

    def observe(
        self, layer: int, streams: Ints, ids: Ints, weights: Floats | None = None, hidden: Any | None = None
    ) -> None:
        shared = self._like_this[layer][ids].sum(axis=1)
        self._match.data[streams] = self._match.data[streams] * FADE + shared
        self._next_match.data[streams] += PREVIOUS_WEIGHT * self._like_previous[layer][ids].sum(axis=1)

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        voted = self._votes(streams) @ self._used[layer]
        mixed = (1 - SMOOTHING) * voted + SMOOTHING * self._stored["popularity"][layer]
        return as_probabilities(mixed, self._shape.top_k)

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        found: Probabilities = np.clip(self._votes(streams) @ self._soon[layer], 0, 1)
        return found

    def _votes(self, streams: Ints) -> npt.NDArray[np.float32]:
        """[T, M]; rows sum to 1."""
        match = self._match.data[streams]
        weight = np.exp(SHARPNESS * (match - match.max(axis=1, keepdims=True)))
        votes: npt.NDArray[np.float32] = weight / weight.sum(axis=1, keepdims=True)
        return votes


def _by_expert(used: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[L, M, E] -> [L, E + 1, M]: which stored tokens used an expert."""
    layers, tokens, experts = used.shape
    out = np.zeros((layers, experts + 1, tokens), dtype=np.float32)
    out[:, :experts] = used.transpose(0, 2, 1)
    return out


METHOD = SimilarRequest
