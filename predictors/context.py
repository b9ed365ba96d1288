"""Context: a linear forecast of one layer's experts from what a stream has routed lately.

Evidence: the newest layers of the current token, the previous token around the layer in question, and that layer's
averages over the stream. All of it is counts of uses, so a least-squares fit needs nothing but how often pairs of
them occur together. Fitted this way, evidence that says the same thing twice is not counted twice, which is where
naive Bayes over several layers fails.

Knows numpy only.

Shape alphabet: T rows, N tokens, C sources (one layer's ids each), R rates, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from predictors.averages import past_averages
from predictors.predictor import Floats, Ints, RouterShape
from predictors.streams import UNKNOWN, Routes, Rows, multi_hot
from predictors.trace import RoutingTrace

Array = npt.NDArray[np.float32]

RATES = (0.8, 0.98)
"""Decay per token: from what is used at the moment to what this text uses."""
BACK = 8
"""Layers of the current token that are looked at; 4 lose about 2 points of recall."""
AROUND = (-1, 0, 1, 2)
"""Layers of the previous token, relative to the one forecast."""
RIDGE = 30.0
"""In tokens; 3 to 300 are alike within half a point."""
FIT_TOKENS = 32768
"""Of a longer trace as many, evenly spread, are fitted to."""


@dataclass(frozen=True)
class Window:
    """The evidence for one forecast: which layers of the current and the previous token, and the averages' layer."""

    current: tuple[int, ...]
    previous: tuple[int, ...]
    layer: int

    @property
    def num_sources(self) -> int:
        return len(self.current) + len(self.previous)


def window_of(layer: int, newest: int, num_layers: int) -> Window:
    """Evidence on `layer` once layers 0 to `newest` of the token are known (UNKNOWN: none yet)."""
    current = tuple(range(max(0, newest - BACK + 1), newest + 1))
    return Window(current, tuple(layer + a for a in AROUND if 0 <= layer + a < num_layers), layer)


class Context:
    """What the forecasts of running streams look at."""

    def __init__(self, shape: RouterShape) -> None:
        self.routes = Routes(shape)
        self._num_experts = shape.num_experts
        self._averages = Rows((len(RATES), shape.num_layers, shape.num_experts), np.float32)
        self._rates = np.array(RATES, dtype=np.float32)[:, None, None]

    def begin(self, streams: Ints) -> None:
        self.routes.begin(streams)
        self._averages.reset(streams)

    def step(self, streams: Ints) -> None:
        used = multi_hot(self.routes.current[streams], self._num_experts)[:, None]
        self._averages.data[streams] = self._averages.data[streams] * self._rates + used * (1 - self._rates)
        self.routes.step(streams)

    def observe(self, layer: int, streams: Ints, ids: Ints) -> None:
        self.routes.observe(layer, streams, ids)

    def averages(self, layer: int, streams: Ints) -> Array:
        """[T, R, E]: uses per token, over the tokens before the current one."""
        found: Array = self._averages.data[streams, :, layer]
        return found

    def all_averages(self, streams: Ints) -> Array:
        """[T, R, L, E]: the same for every layer."""
        found: Array = self._averages.data[streams]
        return found

    def averages_with_current(self, layer: int, streams: Ints) -> Array:
        """[T, R, E]: the same once the current token's experts of `layer` were observed, and counted."""
        used = multi_hot(self.routes.current[streams, layer], self._num_experts)[:, None]
        rates = self._rates[:, 0]
        mixed: Array = self.averages(layer, streams) * rates + used * (1 - rates)
        return mixed

    def ids(self, window: Window, streams: Ints) -> npt.NDArray[np.int32]:
        """[T, C, K], UNKNOWN where nothing was routed."""
        current = self.routes.current[streams][:, window.current]
        return np.concatenate([current, self.routes.previous[streams][:, window.previous]], axis=1)


class ByContext:
    """Base of predictors that follow streams by their context."""

    def __init__(self, shape: RouterShape) -> None:
        self._shape = shape
        self._context = Context(shape)

    def begin(self, streams: Ints) -> None:
        """See Predictor."""
        self._context.begin(streams)

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        """See Predictor."""
        self._context.step(streams)

    def observe(
        self, layer: int, streams: Ints, ids: Ints, weights: Floats | None = None, hidden: Any | None = None
    ) -> None:
        """See Predictor."""
        self._context.observe(layer, streams, ids)


class Linear:
    """Weights of one window's evidence."""

    def __init__(self, window: Window, by_id: Array, by_average: Array, bias: Array) -> None:
        """`by_id` [C, E, E]: what each expert of each source adds; `by_average` [R, E, E]; `bias` [E]."""
        self.window = window
        experts = by_id.shape[1]
        # UNKNOWN is -1: it picks the last row, which adds nothing.
        self._by_id = np.zeros((len(by_id), experts + 1, experts), dtype=np.float32)
        self._by_id[:, :-1] = by_id
        self._source = np.arange(len(by_id))[:, None]
        self._by_average = np.ascontiguousarray(by_average.reshape(-1, experts), dtype=np.float32)
        self._bias = bias.astype(np.float32)

    def forecast(self, context: Context, streams: Ints) -> Array:
        """[T, E], before it is made a probability."""
        ids = context.ids(self.window, streams)
        averages = context.averages(self.window.layer, streams).reshape(len(streams), -1)
        out: Array = averages @ self._by_average + self._bias
        if ids.shape[1]:
            out += self._by_id[self._source, ids].sum(axis=(1, 2))
        return out

    def packed(self) -> npt.NDArray[np.float16]:
        """[C E + R E + 1, E]."""
        experts = self._by_id.shape[2]
        parts = [self._by_id[:, :-1].reshape(-1, experts), self._by_average, self._bias[None]]
        return np.concatenate(parts).astype(np.float16)

    @classmethod
    def unpack(cls, window: Window, packed: npt.NDArray[np.floating], num_experts: int) -> Linear:
        sources, rates = window.num_sources, len(RATES)
        if packed.shape != ((sources + rates) * num_experts + 1, num_experts):
            raise ValueError(f"weights of layer {window.layer} have shape {packed.shape}")
        square = packed[:-1].reshape(sources + rates, num_experts, num_experts).astype(np.float32)
        return cls(window, square[:sources], square[sources:], packed[-1].astype(np.float32))


class Evidence:
    """A trace as `Linear` forecasts see it, to fit them: which uses occur together, counted once for all layers."""

    def __init__(self, trace: RoutingTrace) -> None:
        stride = -(-trace.num_tokens // FIT_TOKENS)
        self.rows = np.arange(0, trace.num_tokens, stride)
        """[n]: the tokens that are fitted to."""
        self._experts, self._layers = trace.num_experts, trace.num_layers
        ids = trace.ids.astype(np.int32)
        previous = np.roll(ids, 1, axis=0)
        previous[trace.seq_offsets[:-1]] = UNKNOWN
        self._current = multi_hot(ids[self.rows], self._experts).transpose(1, 0, 2).copy()
        self._previous = previous[self.rows]
        self._averages = [past_averages(trace, rate)[self.rows] for rate in RATES]
        self._together = {layer: self._band(layer) for layer in range(self._layers)}

    def used(self, layer: int) -> Array:
        """[n, E]: the experts that were used, 1."""
        used: Array = self._current[layer]
        return used

    def fit(self, windows: list[Window], targets: list[Array]) -> list[list[Linear]]:
        """For each window one forecast per target [n, E]; the windows are of one layer."""
        layers = sorted({layer for window in windows for layer in window.current})
        own = self._own(windows[0])
        current = np.concatenate([own[:, :0], *(self._current[layer] for layer in layers)], axis=1)
        pairs = _Pairs(layers, self._experts, own.T @ own, current.T @ own)
        wanted = np.concatenate(targets, axis=1)
        sums = np.concatenate([current.T @ wanted, own.T @ wanted])
        return [self._solve(window, pairs, sums) for window in windows]

    def _band(self, layer: int) -> Array:
        """[E, up to BACK E]: uses of `layer` together with those of it and the layers after it."""
        after = self._current[layer : layer + BACK].transpose(1, 0, 2).reshape(len(self.rows), -1)
        band: Array = self._current[layer].T @ after
        return band

    def _own(self, window: Window) -> Array:
        """[n, F]: evidence that all windows of a layer have, and a column of ones."""
        blocks = [multi_hot(self._previous[:, layer], self._experts) for layer in window.previous]
        blocks += [averages[:, window.layer] for averages in self._averages]
        return np.concatenate([*blocks, np.ones((len(self.rows), 1), np.float32)], axis=1)

    def _solve(self, window: Window, pairs: _Pairs, sums: Array) -> list[Linear]:
        known = pairs.columns(window.current)
        rest = np.arange(len(sums) - len(pairs.own), len(sums))
        system = np.block(
            [
                [self._current_pairs(window.current), pairs.cross[known]],
                [pairs.cross[known].T, pairs.own],
            ]
        ).astype(np.float64)
        diagonal = np.arange(len(system) - 1)
        system[diagonal, diagonal] += RIDGE  # not the bias
        weights = np.linalg.solve(system, sums[np.concatenate([known, rest])].astype(np.float64))
        each = np.split(weights, weights.shape[1] // self._experts, axis=1)
        return [Linear.unpack(window, one, self._experts) for one in each]

    def _current_pairs(self, layers: tuple[int, ...]) -> Array:
        """[C E, C E] for successive layers."""
        size = self._experts
        out = np.zeros((len(layers) * size, len(layers) * size), dtype=np.float32)
        for i, layer in enumerate(layers):
            here, after = slice(i * size, (i + 1) * size), slice(i * size, len(out))
            out[here, after] = self._together[layer][:, : len(out) - i * size]
            out[after, here] = out[here, after].T
        return out


@dataclass(frozen=True)
class _Pairs:
    """Sums over tokens of products of evidence, where a layer's own evidence is part of them."""

    layers: list[int]
    num_experts: int
    own: Array
    """[F, F]"""
    cross: Array
    """[len(layers) E, F]"""

    def columns(self, layers: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Rows of `cross` that belong to `layers`."""
        starts = [self.layers.index(layer) * self.num_experts for layer in layers]
        return np.concatenate([np.arange(0), *(np.arange(s, s + self.num_experts) for s in starts)])
