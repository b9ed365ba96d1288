"""How well a predictor knows recorded routes: recall and precision by lookahead and layer, and who is left out to test.

A trace's sequences run as streams, many at a time, so that a method is judged in the form in which it serves.
Knows numpy only; what forecasts do to a cache is expert_cache/simulation/replay.py.

Shape alphabet: T rows, D lookaheads, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from predictors.predictor import FUTURE, Ints, Predictor, Probabilities
from predictors.trace import RoutingTrace

BEFORE_THE_FIRST = 0
"""As a lookahead: the forecast for every layer that is made before the token's first one."""
SURE = 0.5
"""Probability from which an expert counts as expected, where a forecast may name more or fewer than K."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Counts over all tokens; a cell without tokens is a lookahead that its layer does not have."""

    distances: tuple[int, ...]
    uses: npt.NDArray[np.int64]
    """[D, L] experts used."""
    hits: npt.NDArray[np.int64]
    """[D, L] of them among the K most likely."""
    sure: npt.NDArray[np.int64]
    """[D, L] experts expected with at least SURE."""
    sure_hits: npt.NDArray[np.int64]
    """[D, L] of those, used."""

    def recall(self, distance: int) -> float:
        """Used experts that are among the K most likely; of K guesses the same share is right, so precision as well."""
        d = self.distances.index(distance)
        return _share(self.hits[d].sum(), self.uses[d].sum())

    def recall_by_layer(self, distance: int) -> list[float | None]:
        d = self.distances.index(distance)
        return [_share(h, u) if u else None for h, u in zip(self.hits[d].tolist(), self.uses[d].tolist(), strict=True)]

    def sure_recall(self, distance: int) -> float:
        d = self.distances.index(distance)
        return _share(self.sure_hits[d].sum(), self.uses[d].sum())

    def sure_precision(self, distance: int) -> float:
        """nan where nothing was expected."""
        d = self.distances.index(distance)
        return _share(self.sure_hits[d].sum(), self.sure[d].sum())


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")


def evaluate(
    predictor: Predictor, trace: RoutingTrace, distances: Sequence[int], batch: int = 64, hidden: Any | None = None
) -> Scores:
    """`hidden` [N, L, H]: what goes into each layer's experts, for methods that need it."""
    counts = np.zeros((4, len(distances), trace.num_layers), dtype=np.int64)
    for streams, rows in run_streams(predictor, trace, batch):
        for newest in range(-1, trace.num_layers - 1):
            if newest >= 0:
                show(predictor, trace, newest, streams, rows, hidden)
            for layer, d in targets(newest, distances, trace.num_layers):
                counts[:, d, layer] += _count(predictor.probabilities(layer, streams), trace.ids[rows, layer])
    return Scores(tuple(distances), *counts)


def targets(newest: int, distances: Sequence[int], num_layers: int) -> Iterator[tuple[int, int]]:
    """(layer, index into `distances`) of the forecasts that are judged after `newest` was observed, -1 for none."""
    for d, distance in enumerate(distances):
        if distance == BEFORE_THE_FIRST and newest < 0:
            yield from ((layer, d) for layer in range(num_layers))
        elif distance != BEFORE_THE_FIRST and 0 <= newest < num_layers - distance:
            yield newest + distance, d


def run_streams(predictor: Predictor, trace: RoutingTrace, batch: int) -> Iterator[tuple[Ints, Ints]]:
    """(streams, trace rows) of each step, up to `batch` sequences at a time; the predictor has begun the tokens."""
    waiting = list(trace.sequence_slices())[::-1]
    free = list(range(batch))
    running: dict[int, range] = {}
    while waiting or running:
        while waiting and free:
            rows = waiting.pop()
            _begin(predictor, heapq.heappop(free), trace, rows, running)
        streams = np.array(sorted(running))
        rows_now = np.array([running[s].start for s in streams.tolist()])
        predictor.step(streams, None if trace.token_ids is None else trace.token_ids[rows_now])
        yield streams, rows_now
        for stream in streams.tolist():
            running[stream] = running[stream][1:]
            if not running[stream]:
                del running[stream]
                heapq.heappush(free, stream)


def _begin(predictor: Predictor, stream: int, trace: RoutingTrace, rows: slice, running: dict[int, range]) -> None:
    predictor.begin(np.array([stream]))
    running[stream] = range(rows.start, rows.stop)
    if FUTURE in predictor.needs:
        future = trace.select([int(np.searchsorted(trace.seq_offsets, rows.start))])
        predictor.reveal(stream, future)  # type: ignore[attr-defined]


def show(
    predictor: Predictor, trace: RoutingTrace, layer: int, streams: Ints, rows: Ints, hidden: Any | None = None
) -> None:
    """Let the predictor observe what `rows` did in `layer`."""
    weights = None if trace.weights is None else trace.weights[rows, layer]
    predictor.observe(
        layer,
        streams,
        trace.ids[rows, layer].astype(np.int32),
        weights,
        None if hidden is None else hidden[rows, layer],
    )


def _count(probabilities: Probabilities, ids: Ints) -> npt.NDArray[np.int64]:
    """uses, hits, sure, sure hits."""
    top_k = ids.shape[1]
    likely = np.argpartition(-probabilities, top_k - 1, axis=1)[:, :top_k]
    hits = (likely[:, :, None] == ids[:, None, :]).sum()
    sure_hits = (np.take_along_axis(probabilities, ids.astype(np.int64), axis=1) >= SURE).sum()
    return np.array([ids.size, hits, (probabilities >= SURE).sum(), sure_hits])


def split_sequences(trace: RoutingTrace, train_frac: float = 0.8, seed: int = 0) -> tuple[RoutingTrace, RoutingTrace]:
    """(train, test): whole sequences, at random. ValueError if there are not two."""
    if trace.num_sequences < 2:
        raise ValueError(f"{trace.source} has one sequence; give at least 2, some to learn from and some to test on")
    order = np.random.default_rng(seed).permutation(trace.num_sequences)
    cut = min(max(1, round(train_frac * trace.num_sequences)), trace.num_sequences - 1)
    return trace.select(sorted(order[:cut].tolist())), trace.select(sorted(order[cut:].tolist()))
