"""Events: a trace as a cache sees it, one layer's whole expert set per step.

A step is one forward pass: with `concurrency` B, one token of each of up to B sequences. The next sequence starts
where another ended, as in continuous batching. Knows numpy and traces; neither slots nor policies.

Shape alphabet: L layers, E experts per layer, V events, M expert uses summed over the events.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from predictors.predictor import Ints
from predictors.trace import RoutingTrace

NEVER = np.iinfo(np.int64).max
"""In place of the next use of an expert that is not used again."""


@dataclass(frozen=True, eq=False)
class Events:
    """All events in the order they happen; uses of one event are distinct experts in ascending order."""

    num_layers: int
    num_experts: int
    layers: npt.NDArray[np.int64]
    """[V]: each event's MoE layer."""
    offsets: npt.NDArray[np.int64]
    """[V+1]: event v is uses offsets[v] to offsets[v+1]."""
    experts: npt.NDArray[np.int64]
    """[M]."""
    counts: npt.NDArray[np.int64]
    """[M] tokens that use the expert in this step."""
    weights: npt.NDArray[np.float64] | None
    """[M] router weights summed over those tokens, if the trace has them."""
    num_tokens: int

    def __iter__(self) -> Iterator[tuple[int, Ints, Ints, npt.NDArray[Any] | None]]:
        """(layer, experts, counts, weights) of each event: the arguments of `Policy.record`."""
        bounds = self.offsets.tolist()
        for v, layer in enumerate(self.layers.tolist()):
            uses = slice(bounds[v], bounds[v + 1])
            yield layer, self.experts[uses], self.counts[uses], None if self.weights is None else self.weights[uses]

    @property
    def num_events(self) -> int:
        return len(self.layers)

    def event_of_use(self) -> npt.NDArray[np.int64]:
        """[M]."""
        return np.repeat(np.arange(self.num_events), np.diff(self.offsets))

    def layer_of_use(self) -> npt.NDArray[np.int64]:
        """[M]."""
        return np.repeat(self.layers, np.diff(self.offsets))

    def step_of_event(self) -> npt.NDArray[np.int64]:
        """[V]: how many earlier events its layer has had."""
        return occurrence(self.layers)

    def uses_by_step(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(order [M], bounds [steps + 1]): order[bounds[i] : bounds[i + 1]] are the uses of step i in all layers."""
        steps = np.repeat(self.step_of_event(), np.diff(self.offsets))
        order = np.argsort(steps, kind="stable")
        return order, np.searchsorted(steps[order], np.arange(steps.max(initial=-1) + 2))

    def cell_of_use(self) -> npt.NDArray[np.int64]:
        """[M]: layer * E + expert."""
        return self.layer_of_use() * self.num_experts + self.experts

    def uses_by_layer(self) -> npt.NDArray[np.int64]:
        """[L] expert uses: hits plus misses of any cache."""
        return np.bincount(self.layer_of_use(), minlength=self.num_layers)

    def next_event_of_use(self) -> npt.NDArray[np.int64]:
        """[M]: the next event that uses the same expert of the same layer, or NEVER."""
        cells = self.cell_of_use()
        order = np.argsort(cells, kind="stable")
        same = cells[order[1:]] == cells[order[:-1]]
        following = np.full(len(cells), NEVER)
        following[order[:-1][same]] = self.event_of_use()[order[1:][same]]
        return following


def events_of(trace: RoutingTrace, concurrency: int = 1) -> Events:
    """The trace's events. Raises ValueError for a concurrency below 1."""
    steps = _step_of_token(trace, concurrency)
    num_layers, num_experts = trace.num_layers, trace.num_experts
    event = steps[:, None, None] * num_layers + np.arange(num_layers)[:, None]
    pairs = (event * num_experts + trace.ids).ravel()
    uses, inverse, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    events = uses // num_experts
    num_events = int(events[-1]) + 1
    weights = None if trace.weights is None else _sums(inverse, trace.weights)
    return Events(
        num_layers=num_layers,
        num_experts=num_experts,
        layers=np.arange(num_events) % num_layers,
        offsets=np.searchsorted(events, np.arange(num_events + 1)).astype(np.int64),
        experts=uses % num_experts,
        counts=counts,
        weights=weights,
        num_tokens=trace.num_tokens,
    )


def events_from(sets: Iterable[tuple[int, Ints]], num_layers: int, num_experts: int) -> Events:
    """Events from (layer, distinct ascending experts) pairs, such as a live buffer; each use counts as one token."""
    listed = list(sets)
    sizes = [len(experts) for _, experts in listed]
    experts = np.concatenate([experts for _, experts in listed]) if listed else np.zeros(0)
    layers = np.array([layer for layer, _ in listed], dtype=np.int64)
    return Events(
        num_layers=num_layers,
        num_experts=num_experts,
        layers=layers,
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        experts=experts.astype(np.int64),
        counts=np.ones(len(experts), dtype=np.int64),
        weights=None,
        num_tokens=int(np.bincount(layers).max()) if listed else 0,
    )


def occurrence(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each entry's value came before it: [3, 5, 3, 3] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, dtype=np.int64)
    group_start = np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - group_start
    return result


def _sums(group: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.asarray(np.bincount(group.ravel(), values.ravel()), dtype=np.float64)


def _step_of_token(trace: RoutingTrace, concurrency: int) -> npt.NDArray[np.int64]:
    """[N]: the step each token runs in; a sequence starts on the slot that is free first."""
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; give 1 or more")
    steps = np.empty(trace.num_tokens, dtype=np.int64)
    free_at = [0] * concurrency
    for rows in trace.sequence_slices():
        start = heapq.heappop(free_at)
        steps[rows] = np.arange(start, start + rows.stop - rows.start)
        heapq.heappush(free_at, start + rows.stop - rows.start)
    return steps
