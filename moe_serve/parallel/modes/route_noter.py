"""RouteNoter: what a rank's routers chose in a step, for the front. Knows token rows; knows no sequences' contents.

Shape alphabet: L MoE layers, K choices, n tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from moe_serve.execution import forward_batch
from moe_serve.hf.experts import RunsExperts
from moe_serve.parallel.modes.runner import RankStep
from moe_serve.parallel.wire.messages import NO_ROUTES, ROUTE_IDS_AND_WEIGHTS, RoutePiece
from moe_serve.scheduling.batch_plan import BatchPlan
from predictors.shape import MoELayer

Rows: TypeAlias = NDArray[np.int64]


class RouteNoter:
    """Stands before a mode's layers: notes what the routers chose and hands on."""

    def __init__(self, inner: RunsExperts, num_experts: int) -> None:
        self._wanted = NO_ROUTES
        self._inner = inner
        self._rows: torch.Tensor | None = None
        self._ids_dtype = np.dtype(np.uint8 if num_experts <= 256 else np.int16)
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def begin(self, wanted: int, rows: torch.Tensor | None = None) -> None:
        """A step begins; what one that failed has left is forgotten.

        `wanted`: as Step says. `rows` [n] int64: the rows of the batch that this rank has to tell of; None: all.
        """
        self._wanted = wanted
        self._rows = rows
        self._ids.clear()
        self._weights.clear()

    def run(self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As Experts.run."""
        if self._wanted != NO_ROUTES:
            self._ids.append(ids if self._rows is None else ids[self._rows])
            self._weights.append(weights if self._rows is None else weights[self._rows])
        return self._inner.run(layer, hidden, ids, weights)

    def take(self, step: RankStep, own: Items[int] | None = None) -> RoutePiece | None:
        """The step's piece, if there is something to tell. `own`: the items of the step that the batch was made of;
        None: all."""
        if not self._ids or not len(self._ids[0]):
            return None
        rows = plan_numbers(step.plan, range(len(step.homes)) if own is None else own)
        if self._rows is not None:
            rows = rows[self._rows.cpu().numpy()]
        ids = torch.stack(self._ids, dim=1).cpu().numpy().astype(self._ids_dtype)
        if self._wanted != ROUTE_IDS_AND_WEIGHTS:
            return RoutePiece(rows.astype(np.int32), ids)
        weights = torch.stack(self._weights, dim=1).float().cpu().numpy()
        return RoutePiece(rows.astype(np.int32), ids, weights.astype(np.float16))


def plan_numbers(plan: BatchPlan, own: Items[int]) -> Rows:
    """For each row of the batch made of items `own` of a plan, its token's number in the whole plan's order."""
    part = BatchPlan(tuple(plan.scheduled[i] for i in own))
    numbers = np.empty(part.num_tokens, np.int64)
    spans = plan.spans()
    for rows, i in zip(forward_batch.rows_of(part), own, strict=True):
        numbers[rows] = range(spans[i].start, spans[i].stop)
    return numbers


def renumbered(piece: RoutePiece | None, plan: BatchPlan, own: Items[int]) -> RoutePiece | None:
    """A piece about the plan made of items `own` of `plan`, as one about `plan`."""
    if piece is None:
        return None
    spans = plan.spans()
    numbers = np.concatenate([np.arange(spans[i].start, spans[i].stop, dtype=np.int32) for i in own])
    return RoutePiece(numbers[piece.rows], piece.ids, piece.weights)
