"""The front's side of a step: the batch plan as a message, and what the ranks sampled as one result.

A step says what was added since the step before: ranks keep a mirror of every live sequence. Knows plans and
messages; knows no sockets.

Shape alphabet: T tokens of the step in plan order, L MoE layers by dense index, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from moe_serve.parallel.wire.messages import (
    NO_ROUTES,
    ROUTE_IDS_AND_WEIGHTS,
    Item,
    NewSequence,
    RoutePiece,
    Sampled,
    Step,
    StepDone,
)
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence, StepError, StepResult, StepRoutes
from moe_serve.scheduling.sequence import Sequence
from predictors.predictor import RouterShape


class StepWriter:
    """Plans as messages, and which sequences the ranks know already."""

    def __init__(self) -> None:
        self._keys: dict[Sequence, int] = {}
        self._known_tokens: dict[Sequence, int] = {}
        self._next_key = 0

    def write(self, plan: BatchPlan, routes: int = NO_ROUTES) -> Step:
        """`routes`: what is wanted of the step's routes, as Step says."""
        gone = [seq for seq in self._keys if seq.is_finished]
        message = Step(
            routes=routes,
            gone=[self._keys.pop(seq) for seq in gone],
            new=[self._introduce(i.seq) for i in plan.scheduled if i.seq not in self._keys],
            items=[self._item(i) for i in plan.scheduled],
        )
        for seq in gone:
            del self._known_tokens[seq]
        return message

    def _introduce(self, seq: Sequence) -> NewSequence:
        self._keys[seq] = key = self._next_key
        self._known_tokens[seq] = seq.num_tokens
        self._next_key += 1
        return NewSequence(
            key=key,
            request_id=seq.request.request_id,
            index=seq.index,
            num_prompt=seq.num_prompt,
            tokens=seq.token_ids,
            max_total_tokens=seq.max_total_tokens,
            home=seq.home_rank,
            params=seq.params,
        )

    def _item(self, item: ScheduledSequence) -> Item:
        seq = item.seq
        fresh = seq.token_ids[self._known_tokens[seq] :]
        self._known_tokens[seq] = seq.num_tokens
        return Item(self._keys[seq], item.start, item.count, fresh, list(seq.page_ids))


def merge(plan: BatchPlan, answers: Items[StepDone], shape: RouterShape, routes: int = NO_ROUTES) -> StepResult:
    """The StepResult that all ranks' answers make together. `routes`: what was wanted of them."""
    sampled: dict[int, Sampled] = {}
    errors: dict[Sequence, StepError] = {}
    late: set[Sequence] = set()
    for answer in answers:
        sampled.update(answer.sampled)
        errors.update({plan.scheduled[i].seq: error for i, error in answer.errors.items()})
        late.update(plan.scheduled[i].seq for i in answer.late)
    wanted = [i for i, item in enumerate(plan.scheduled) if item.needs_sample]
    missing = [i for i in wanted if i not in sampled]
    assert not missing, f"no rank sampled items {missing}"
    tokens, logprobs = tuple(sampled[i][0] for i in wanted), tuple(sampled[i][1] for i in wanted)
    result = StepResult(tokens, logprobs, errors, late=frozenset(late))
    if routes == NO_ROUTES:
        return result
    pieces = [answer.routes for answer in answers if answer.routes is not None]
    return replace(result, routes=gather(plan, pieces, shape, routes))


def gather(plan: BatchPlan, pieces: Items[RoutePiece], shape: RouterShape, wanted: int) -> StepRoutes:
    """All ranks' pieces as one step's routes, in plan order."""
    size = plan.num_tokens, len(shape.layer_ids), shape.top_k
    num_told = sum(len(piece.rows) for piece in pieces)
    assert num_told == size[0], f"the ranks told the routes of {num_told} tokens instead of {size[0]}"
    ids = np.empty(size, np.uint8 if shape.num_experts <= 256 else np.int16)
    weights = np.empty(size, np.float16) if wanted == ROUTE_IDS_AND_WEIGHTS else None
    for piece in pieces:
        assert piece.ids.shape[1:] == size[1:], f"routes of shape {piece.ids.shape} instead of {size}"
        ids[piece.rows] = piece.ids
        if weights is not None:
            weights[piece.rows] = piece.weights
    return StepRoutes(ids, weights, plan.spans())
