"""Routes over ranks: each notes what its routers chose, and the front puts a step's tokens together again.

On a rank a `RouteNoter` stands before the mode's layers. Its notes travel with the answer to a step as one piece: the
routes of some of the step's tokens in all layers. Knows token rows; knows no sequences' contents.

Shape alphabet: T tokens of the whole step in plan order, L MoE layers by dense index, K choices, n rows of a piece.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_serve.execution import forward_batch
from moe_serve.expert_routes.route_recorder import RoutingShape
from moe_serve.hf.experts import RunsExperts
from moe_serve.parallel.wire.messages import RankStep
from moe_serve.scheduling.batch_plan import BatchPlan, StepRoutes
from predictors.shape import MoELayer

OFF, IDS, IDS_AND_WEIGHTS = 0, 1, 2
"""What the front wants to know, as a step's message says it."""
Rows = NDArray[np.int64]


class RouteNoter:
    """Stands before a mode's layers: notes what the routers chose and hands on."""

    def __init__(self, inner: RunsExperts, num_experts: int) -> None:
        self.wanted = OFF
        self._inner = inner
        self._rows: torch.Tensor | None = None
        self._ids_dtype = np.dtype(np.uint8 if num_experts <= 256 else np.int16)
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []

    def begin(self, wanted: int, rows: torch.Tensor | None = None) -> None:
        """A step begins; what one that failed has left is forgotten.

        `rows` [n] int64: the rows of the batch that this rank has to tell of; None: all.
        """
        self.wanted = wanted
        self._rows = rows
        self._ids.clear()
        self._weights.clear()

    def run(self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As Experts.run."""
        if self.wanted:
            self._ids.append(ids if self._rows is None else ids[self._rows])
            self._weights.append(weights if self._rows is None else weights[self._rows])
        return self._inner.run(layer, hidden, ids, weights)

    def take(self, numbers: Rows) -> list[dict[str, Any]]:
        """The step's piece, if there is something to tell; `numbers` [rows of the batch]: see `plan_numbers`."""
        if not self._ids or not len(self._ids[0]):
            return []
        rows = numbers if self._rows is None else numbers[self._rows.cpu().numpy()]
        ids = torch.stack(self._ids, dim=1).cpu().numpy().astype(self._ids_dtype)
        piece = {"rows": _pack(rows.astype(np.int32)), "ids": _pack(ids)}
        if self.wanted == IDS_AND_WEIGHTS:
            piece["weights"] = _pack(torch.stack(self._weights, dim=1).float().cpu().numpy().astype(np.float16))
        return [piece]


def plan_numbers(plan: BatchPlan, places: Items[slice]) -> Rows:
    """For each row of the batch made of a plan, its token's number; `places`: those of each scheduled sequence."""
    numbers = np.empty(plan.num_tokens, np.int64)
    for span, place in zip(forward_batch.rows_of(plan), places, strict=True):
        numbers[span] = range(place.start, place.stop)
    return numbers


def whole_step(tap: RouteNoter, step: RankStep) -> list[dict[str, Any]]:
    """The pieces of a rank whose batch is the whole step."""
    return tap.take(plan_numbers(step.plan, spans(step.plan))) if step.routes else []


def renumbered(pieces: Items[Mapping[str, Any]], places: Items[slice]) -> list[dict[str, Any]]:
    """Pieces of a part of a plan as pieces of the whole; `places`: the numbers of each sequence there."""
    numbers = np.concatenate([np.arange(place.start, place.stop, dtype=np.int32) for place in places])
    return [{**piece, "rows": _pack(numbers[_unpack(piece["rows"], np.int32, -1)])} for piece in pieces]


def spans(plan: BatchPlan) -> tuple[slice, ...]:
    """Each scheduled sequence's tokens in plan order."""
    ends = np.cumsum([item.count for item in plan.scheduled]).tolist()
    return tuple(slice(end - item.count, end) for item, end in zip(plan.scheduled, ends, strict=True))


def gather(plan: BatchPlan, answers: Items[Mapping[str, Any]], shape: RoutingShape, wanted: int) -> StepRoutes:
    """All ranks' pieces as one step's routes, in plan order."""
    size = plan.num_tokens, len(shape.layer_ids), shape.top_k
    ids = np.empty(size, np.uint8 if shape.num_experts <= 256 else np.int16)
    weights = np.empty(size, np.float16) if wanted == IDS_AND_WEIGHTS else None
    num_seen = 0
    for piece in (piece for answer in answers for piece in answer["routes"]):
        rows = _unpack(piece["rows"], np.int32, -1)
        found = _unpack(piece["ids"], ids.dtype, len(rows), -1, shape.top_k)
        num_seen += len(rows) * found.shape[1]
        if found.shape[1] == size[1]:
            ids[rows] = found
            if weights is not None:
                weights[rows] = _unpack(piece["weights"], weights.dtype, *found.shape)
    assert num_seen == size[0] * size[1], f"routes of {num_seen} instead of {size[0] * size[1]} token layers"
    return StepRoutes(ids, weights, spans(plan))


def _pack(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).data).decode()


def _unpack(text: str, dtype: Any, *shape: int) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
