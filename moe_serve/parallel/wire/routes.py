"""Routes over ranks: each notes what its routers chose, and the front puts a step's tokens together again.

On a rank a `RouteNoter` stands before the mode's layers. Its notes travel with the answer to a step as pieces: so
many tokens in so many layers. A conventional rank sends one piece, since its tokens are the same in all layers; a
coherent one sends a piece per layer, since tokens move. Knows token rows; knows no sequences' contents.

Shape alphabet: T tokens of the whole step in plan order, L MoE layers by dense index, K choices, n rows of a piece.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_serve.execution import forward_batch
from moe_serve.expert_routes.route_recorder import RoutingShape
from moe_serve.hf.experts import RunsExperts
from moe_serve.parallel.wire.messages import RankStep
from moe_serve.scheduling.batch_plan import BatchPlan, StepRoutes

OFF, IDS, IDS_AND_WEIGHTS = 0, 1, 2
"""What the front wants to know, as a step's message says it."""
Rows = NDArray[np.int64]


class Note(NamedTuple):
    """What one layer's router chose."""

    layer: int
    """Dense index."""
    rows: torch.Tensor
    """[n] int64: rows of the step's batch."""
    ids: torch.Tensor
    """[n, K]"""
    weights: torch.Tensor
    """[n, K]"""


class RouteNoter:
    """Stands before a mode's layers: notes what the routers chose and hands on."""

    def __init__(
        self, inner: RunsExperts, layers: Items[int], num_experts: int, rows: Callable[[], torch.Tensor | None]
    ) -> None:
        """`layers`: decoder layers with experts. `rows`: which of the step's tokens, by their rows in the batch, the
        layer is now called for, or those of the whole batch that are this rank's to tell of; None: the layer is called
        for no router's choice."""
        self.wanted = OFF
        self._inner = inner
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._rows = rows
        self._ids_dtype = np.dtype(np.uint8 if num_experts <= 256 else np.int16)
        self._notes: list[Note] = []

    def begin(self, wanted: int) -> None:
        """A step begins; what one that failed has left is forgotten."""
        self.wanted = wanted
        self._notes.clear()

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As ExpertLayers.run."""
        if self.wanted:
            rows = self._rows()
            if rows is not None and len(rows) < len(ids):
                self._notes.append(Note(self._index[layer], rows, ids[rows], weights[rows]))
            elif rows is not None:
                self._notes.append(Note(self._index[layer], rows, ids, weights))
        return self._inner.run(layer, hidden, ids, weights)

    def take(self, numbers: Rows) -> list[dict[str, Any]]:
        """The step's pieces; `numbers` [rows of the batch]: see `plan_numbers`."""
        notes, self._notes = self._notes, []
        return [self._piece(run, numbers) for run in _same_rows(notes) if len(run[0].rows)]

    def _piece(self, run: list[Note], numbers: Rows) -> dict[str, Any]:
        rows = numbers[run[0].rows.cpu().numpy()].astype(np.int32)
        ids = torch.stack([note.ids for note in run], dim=1).cpu().numpy().astype(self._ids_dtype)
        piece = {"layer": run[0].layer, "rows": _pack(rows), "ids": _pack(ids)}
        if self.wanted == IDS_AND_WEIGHTS:
            weights = torch.stack([note.weights for note in run], dim=1).float().cpu().numpy()
            piece["weights"] = _pack(weights.astype(np.float16))
        return piece


def _same_rows(notes: Iterable[Note]) -> list[list[Note]]:
    """Runs of consecutive layers that saw the same tokens."""
    runs: list[list[Note]] = []
    for note in notes:
        if runs and runs[-1][-1].layer + 1 == note.layer and torch.equal(runs[-1][-1].rows, note.rows):
            runs[-1].append(note)
        else:
            runs.append([note])
    return runs


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
        layers = slice(piece["layer"], piece["layer"] + found.shape[1])
        ids[rows, layers] = found
        num_seen += len(rows) * found.shape[1]
        if weights is not None:
            weights[rows, layers] = _unpack(piece["weights"], weights.dtype, *found.shape)
    assert num_seen == size[0] * size[1], f"routes of {num_seen} instead of {size[0] * size[1]} token layers"
    return StepRoutes(ids, weights, spans(plan))


def _pack(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).data).decode()


def _unpack(text: str, dtype: Any, *shape: int) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
