"""Routes of a step from several ranks' pieces. No processes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from moe_serve.parallel.wire import routes
from moe_serve.parallel.wire.routes import RouteNoter
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence
from predictors.predictor import RouterShape

LAYERS = (1, 3)
SHAPE = RouterShape(LAYERS, num_experts=8, top_k=2)


class Nothing:
    """Layers that run no experts."""

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.fixture
def plan() -> BatchPlan:
    """A prompt of 3, then two decoding sequences: in the batch these come first, the shorter context before."""
    seqs = [Sequence(Request(f"{n}", tuple(range(n)), SamplingParams()), 0, list(range(n)), 20) for n in (3, 9, 5)]
    runs = ((0, 3), (8, 1), (4, 1))
    return BatchPlan(tuple(ScheduledSequence(seq, *run) for seq, run in zip(seqs, runs, strict=True)))


def chosen(token: int, layer: int) -> list[int]:
    """Other experts for every token and layer."""
    return [(token + layer) % 8, (token + layer + 4) % 8]


def call(tap: RouteNoter, layer: int, tokens: list[int]) -> None:
    """The router of `layer` has chosen for the tokens with these plan-order numbers."""
    ids = torch.tensor([chosen(token, layer) for token in tokens])
    tap.run(layer, torch.zeros(len(tokens), 4), ids, ids / 8)


def expected() -> list[Any]:
    return [[chosen(token, layer) for layer in LAYERS] for token in range(5)]


def told(*answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(json.dumps([{"routes": pieces} for pieces in answers]))
    return parsed


def test_conventional_ranks_send_one_piece_each(plan: BatchPlan) -> None:
    """Rank 0 has the prompt, rank 1 the others, in the order of its batch: the shorter context first."""
    places = routes.spans(plan)
    answers = []
    for own, tokens in (([0], [0, 1, 2]), ([1, 2], [4, 3])):
        tap = RouteNoter(Nothing(), 8)
        tap.begin(routes.IDS_AND_WEIGHTS)
        for layer in LAYERS:
            call(tap, layer, tokens)
        part = BatchPlan(tuple(plan.scheduled[i] for i in own))
        answers.append(tap.take(routes.plan_numbers(part, [places[i] for i in own])))
    assert [len(pieces) for pieces in answers] == [1, 1]
    found = routes.gather(plan, told(*answers), SHAPE, routes.IDS_AND_WEIGHTS)
    assert found.ids.tolist() == expected()
    assert found.rows == (slice(0, 3), slice(3, 4), slice(4, 5))
    assert found.weights is not None
    assert np.array_equal(found.weights, found.ids / 8)


def test_coherent_ranks_tell_of_the_tokens_at_home_there(plan: BatchPlan) -> None:
    """Every rank's batch is the whole step. Batch rows: the decoding sequences' tokens 4 and 3, then the prompt."""
    numbers = routes.plan_numbers(plan, routes.spans(plan))
    assert numbers.tolist() == [4, 3, 0, 1, 2]
    answers = []
    for at_home in ([0, 2, 3, 4], [1]):
        tap = RouteNoter(Nothing(), 8)
        tap.begin(routes.IDS, torch.tensor(at_home))
        for layer in LAYERS:
            call(tap, layer, numbers.tolist())
        answers.append(tap.take(numbers))
    found = routes.gather(plan, told(*answers), SHAPE, routes.IDS)
    assert found.ids.tolist() == expected()
    assert found.weights is None


def test_a_rank_that_forgets_a_layer_is_noticed(plan: BatchPlan) -> None:
    tap = RouteNoter(Nothing(), 8)
    tap.begin(routes.IDS)
    call(tap, 1, list(range(5)))
    with pytest.raises(AssertionError, match="routes of 5 instead of 10"):
        routes.gather(plan, told(tap.take(np.arange(5))), SHAPE, routes.IDS)


def test_nothing_is_noted_unless_wanted_and_nothing_of_a_failed_step() -> None:
    tap = RouteNoter(Nothing(), 8)
    call(tap, 1, list(range(5)))
    assert tap.take(np.arange(5)) == []
    tap.begin(routes.IDS)
    call(tap, 1, list(range(5)))
    tap.begin(routes.IDS)
    assert tap.take(np.arange(5)) == []
