"""Route pieces: what a rank tells the front of a step's routes. Knows token rows; knows no sequences' contents.

Shape alphabet: L MoE layers, K choices, T tokens of this rank's batch, n of them that it has to tell of.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from expert_cache.running.usage import RouteBuffer
from moe_serve.execution import forward_batch
from moe_serve.parallel.wire.messages import NO_ROUTES, ROUTE_IDS_AND_WEIGHTS, RoutePiece
from moe_serve.scheduling.batch_plan import BatchPlan
from predictors.predictor import Floats, Ints

Rows: TypeAlias = NDArray[np.int64]


def begin_step(routes: RouteBuffer, wanted: int, has_rows: bool = True) -> None:
    """Keep the next step's routes if the front wants them and there are any. `wanted`: as Step says."""
    routes.clear()
    routes.is_on = has_rows and wanted != NO_ROUTES
    routes.keeps_weights = wanted == ROUTE_IDS_AND_WEIGHTS


def piece(
    plan: BatchPlan, own: Items[int], ids: Ints, weights: Floats | None, rows: Rows | None = None
) -> RoutePiece | None:
    """Routes of a batch made of items `own` of a plan, for the front; None if there is nothing to tell.

    ids, weights [T, L, K] in batch order. `rows` [n]: the rows of the batch to tell of; None: all.
    """
    numbers = plan_numbers(plan, own)
    if rows is not None:
        numbers, ids, weights = numbers[rows], ids[rows], None if weights is None else weights[rows]
    if not len(numbers):
        return None
    return RoutePiece(numbers.astype(np.int32), ids, None if weights is None else weights.astype(np.float16))


def taken(routes: RouteBuffer, plan: BatchPlan, rows: Rows) -> RoutePiece | None:
    """What was kept of a step over the whole plan, for the front. `rows` [n]: the tokens to tell of."""
    if not routes.is_on:
        return None
    return piece(plan, range(len(plan.scheduled)), *routes.take(), rows)


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
