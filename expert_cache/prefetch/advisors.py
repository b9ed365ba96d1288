"""Advice: what an advisor tells the cache to bring ahead of time, and the advisors there are.

Advice changes when bytes move, never which experts run: the model's own router decides, and the cache
corrects what was advised wrongly. Knows no bytes and no slots.

Shape alphabet: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from predictors.methods.next_gate import NextGate, Router
from predictors.shape import MoELayer
from predictors.successors import Successors


@dataclass(frozen=True, slots=True)
class Advice:
    """Experts of one layer that are expected, most urgent first."""

    layer: MoELayer
    experts: tuple[int, ...]
    urgencies: tuple[float, ...]
    """Finite; larger is earlier."""


class Advisor(Protocol):
    """Asked once per layer and step."""

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> Sequence[Advice]:
        """The router of `layer` has chosen `experts` (ascending) for `hidden` [T, H]: what comes next?"""
        ...


LAYERS_AHEAD = 2
"""Of FromNextGate: the next layer's experts are often resident, and the disk would be idle meanwhile."""


class FromNextGate:
    """Expects in the next layers as many experts as this one used: those their gates would choose now. Nearer layers
    are more urgent."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._gate = NextGate(routers)
        self._num_layers = len(routers)

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> Sequence[Advice]:
        ahead = range(layer + 1, min(layer + 1 + LAYERS_AHEAD, self._num_layers))
        return [self._expect(later, later - layer, len(experts), hidden) for later in map(MoELayer, ahead)]

    def _expect(self, layer: MoELayer, distance: int, count: int, hidden: torch.Tensor) -> Advice:
        """The best of one layer; scores are at most the number of tokens, so distance comes first in urgency."""
        scores, best = self._gate.scores(layer, hidden).topk(count)
        urgencies = scores - distance * (hidden.shape[0] + 1)
        return Advice(layer, tuple(best.tolist()), tuple(urgencies.tolist()))


class FromAffinity:
    """Expects in the next layer as many experts as this one used, by inter-layer affinity."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._successors = Successors(num_layers, num_experts)
        self._last_layer = num_layers - 1
        self._before: tuple[int, Sequence[int]] | None = None

    def advise(self, layer: MoELayer, experts: Sequence[int], hidden: torch.Tensor) -> Sequence[Advice]:
        if self._before is not None and self._before[0] == layer - 1:
            self._successors.record(layer - 1, self._before[1], experts)
        self._before = layer, experts
        if layer == self._last_layer:
            return ()
        scores = self._successors.scores(layer, experts)
        best = [int(e) for e in (-scores).argsort(kind="stable")[: len(experts)] if scores[e] > 0]
        return (Advice(MoELayer(layer + 1), tuple(best), tuple(float(scores[e]) for e in best)),)
