"""A trained predictor beside the running model: it watches routes, says what comes next, and what is worth keeping.

Each running sequence is a stream of the predictor (predictors/predictor.py). Only single tokens are followed: in a step
with a part of a prompt nearly every expert is used anyway. As an advisor it names the next layer's experts, for the
prefetcher; and where the cache's policy is `predicted`, each layer's eviction is told of the tokens to come as soon as
its router has chosen, as expert_cache/simulation/replay.py does.
Knows plans and predictors; the cache knows neither.

Shape alphabet: T tokens of the step, N of them decode, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.policies.predicted import Predicted
from expert_cache.prefetch.advisors import Advice
from moe_serve.execution import forward_batch
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve.scheduling.sequence import Sequence as Seq
from predictors.predictor import HIDDEN, Foresight, Predictor
from predictors.shape import MoELayer


class LivePredictor:
    """A LayerObserver and an Advisor of HostManagedExperts."""

    def __init__(self, predictor: Predictor, num_layers: int, policy: Predicted | None = None) -> None:
        """`policy`: whose slots it protects, if it can look beyond the current token."""
        self._predictor = predictor
        self._num_layers = num_layers
        self._policy = policy
        self._foresight = predictor if isinstance(predictor, Foresight) else None
        self._wants_hidden = HIDDEN in predictor.needs
        self._streams = Streams()
        self._rows: NDArray[np.int64] = np.zeros(0, np.int64)
        self._now: NDArray[np.int64] = np.zeros(0, np.int64)
        """[N] stream of each row."""
        self._top_k = 0

    def begin_step(self, plan: BatchPlan) -> None:
        """The next pass computes `plan`."""
        rows = forward_batch.rows_of(plan)
        decoding = [(item, span.start) for item, span in zip(plan.scheduled, rows, strict=True) if item.count == 1]
        self._rows = np.array([row for _, row in decoding], np.int64)
        self._now, new = self._streams.of([item.seq for item, _ in decoding])
        if len(new):
            self._predictor.begin(new)
        if len(self._now):
            self._predictor.step(self._now, np.array([item.seq.token_ids[item.start] for item, _ in decoding]))

    def on_layer(self, layer: MoELayer, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """The router of `layer` chose `ids` [T, K] for `hidden` [T, H]; nothing is evicted for it yet."""
        if not len(self._now):
            return
        self._top_k = ids.shape[1]
        seen = hidden[self._rows] if self._wants_hidden else None
        self._predictor.observe(layer, self._now, ids[self._rows].cpu().numpy(), None, seen)
        if self._policy is not None and self._foresight is not None:
            self._policy.set_forecast(layer, self._foresight.upcoming(layer, self._now).sum(axis=0, dtype=np.float64))

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> Sequence[Advice]:
        if not len(self._now) or layer + 1 == self._num_layers:
            return ()
        expected = self._predictor.probabilities(layer + 1, self._now).sum(axis=0)
        count = min(len(experts), self._top_k * len(self._now))
        best = (-expected).argsort(kind="stable")[:count].tolist()
        return (Advice(MoELayer(layer + 1), tuple(best), tuple(float(expected[e]) for e in best)),)


class Streams:
    """Small numbers for running sequences; those of ended ones are given out again."""

    def __init__(self) -> None:
        self._number_of: dict[Seq, int] = {}
        self._free: list[int] = []
        self._num_numbers = 0

    def of(self, sequences: Sequence[Seq]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The number of each sequence, and those numbers that have a new owner."""
        for seq in [s for s in self._number_of if s.is_finished]:
            self._free.append(self._number_of.pop(seq))
        new = []
        for seq in sequences:
            if seq not in self._number_of:
                if not self._free:
                    self._free.append(self._num_numbers)
                    self._num_numbers += 1
                self._number_of[seq] = self._free.pop()
                new.append(self._number_of[seq])
        return np.array([self._number_of[s] for s in sequences], np.int64), np.array(new, np.int64)
