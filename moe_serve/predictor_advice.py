"""A trained predictor as an advisor: what it expects of the sequences that decode in this step.

Each running sequence is a stream of the predictor (predictors/predictor.py). Only single tokens are followed: in a step
with a part of a prompt nearly every expert is used anyway. A step in which the audit forbids prefetching is not
observed, so the next forecast lacks that token and nothing else. Knows plans and predictors; the cache knows neither.

Shape alphabet: T tokens of the step, N of them decode, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.advice import Advice
from moe_serve import forward_batch
from moe_serve.batch_plan import BatchPlan
from moe_serve.sequence import Sequence as Seq
from predictors.predictor import HIDDEN, Predictor


class FromPredictor:
    """An Advisor for the layer after the one whose router has chosen."""

    def __init__(self, predictor: Predictor, num_layers: int, newest_ids: Callable[[], torch.Tensor]) -> None:
        """`newest_ids`: [T, K] what the router chose that is being asked about."""
        self._predictor = predictor
        self._num_layers = num_layers
        self._newest_ids = newest_ids
        self._wants_hidden = HIDDEN in predictor.needs
        self._streams = Streams()
        self._rows: NDArray[np.int64] = np.zeros(0, np.int64)
        self._now: NDArray[np.int64] = np.zeros(0, np.int64)
        """[N] stream of each row."""

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

    def advise(self, layer: int, experts: Sequence[int], hidden: torch.Tensor) -> Sequence[Advice]:
        if not len(self._now) or layer + 1 == self._num_layers:
            return ()
        ids = self._newest_ids()[self._rows].cpu().numpy()
        seen = hidden[self._rows] if self._wants_hidden else None
        self._predictor.observe(layer, self._now, ids, None, seen)
        expected = self._predictor.probabilities(layer + 1, self._now).sum(axis=0)
        best = (-expected).argsort(kind="stable")[: min(len(experts), ids.size)].tolist()
        return (Advice(layer + 1, tuple(best), tuple(float(expected[e]) for e in best)),)


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
