"""Routes of a step from several ranks' pieces. No processes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from moe_serve.parallel.front.step_writer import gather
from moe_serve.parallel.modes.route_noter import RouteNoter, plan_numbers
from moe_serve.parallel.modes.runner import RankStep
from moe_serve.parallel.wire.messages import ROUTE_IDS, ROUTE_IDS_AND_WEIGHTS, RoutePiece, encode, restore
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence
from predictors.predictor import RouterShape
from predictors.shape import MoELayer

LAYERS = (MoELayer(1), MoELayer(3))
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


def call(noter: RouteNoter, layer: MoELayer, tokens: list[int]) -> None:
    """The router of `layer` has chosen for the tokens with these plan-order numbers."""
    ids = torch.tensor([chosen(token, layer) for token in tokens])
    noter.run(MoELayer(layer), torch.zeros(len(tokens), 4), ids, ids / 8)


def expected() -> list[Any]:
    return [[chosen(token, layer) for layer in LAYERS] for token in range(5)]


def told(*pieces: RoutePiece | None) -> list[RoutePiece]:
    """What arrives at the front."""
    return [msgspec.msgpack.decode(encode(p), type=RoutePiece, dec_hook=restore) for p in pieces if p is not None]


def test_conventional_ranks_tell_of_their_own_sequences(plan: BatchPlan) -> None:
    """Rank 0 has the prompt, rank 1 the others, in the order of its batch: the shorter context first."""
    pieces = []
    for own, tokens in (([0], [0, 1, 2]), ([1, 2], [4, 3])):
        noter = RouteNoter(Nothing(), 8)
        noter.begin(ROUTE_IDS_AND_WEIGHTS)
        for layer in LAYERS:
            call(noter, layer, tokens)
        pieces.append(noter.take(RankStep(plan, (0, 1, 1)), own))
    found = gather(plan, told(*pieces), SHAPE, ROUTE_IDS_AND_WEIGHTS)
    assert found.ids.tolist() == expected()
    assert found.rows == (slice(0, 3), slice(3, 4), slice(4, 5))
    assert found.weights is not None
    assert np.array_equal(found.weights, found.ids / 8)


def test_coherent_ranks_tell_of_the_tokens_at_home_there(plan: BatchPlan) -> None:
    """Every rank's batch is the whole step. Batch rows: the decoding sequences' tokens 4 and 3, then the prompt."""
    numbers = plan_numbers(plan, range(3))
    assert numbers.tolist() == [4, 3, 0, 1, 2]
    pieces = []
    for at_home in ([0, 2, 3, 4], [1]):
        noter = RouteNoter(Nothing(), 8)
        noter.begin(ROUTE_IDS, torch.tensor(at_home))
        for layer in LAYERS:
            call(noter, layer, numbers.tolist())
        pieces.append(noter.take(RankStep(plan, (0, 1, 0))))
    found = gather(plan, told(*pieces), SHAPE, ROUTE_IDS)
    assert found.ids.tolist() == expected()
    assert found.weights is None


def test_a_rank_that_forgets_something_is_noticed(plan: BatchPlan) -> None:
    noter = RouteNoter(Nothing(), 8)
    noter.begin(ROUTE_IDS)
    call(noter, MoELayer(1), list(range(5)))
    piece = noter.take(RankStep(plan, (0, 0, 0)))
    with pytest.raises(AssertionError, match=r"routes of shape \(5, 1, 2\) instead of \(5, 2, 2\)"):
        gather(plan, told(piece), SHAPE, ROUTE_IDS)
    with pytest.raises(AssertionError, match="the routes of 0 tokens instead of 5"):
        gather(plan, [], SHAPE, ROUTE_IDS)


def test_nothing_is_noted_unless_wanted_and_nothing_of_a_failed_step(plan: BatchPlan) -> None:
    noter, step = RouteNoter(Nothing(), 8), RankStep(plan, (0, 0, 0))
    call(noter, MoELayer(1), list(range(5)))
    assert noter.take(step) is None
    noter.begin(ROUTE_IDS)
    call(noter, MoELayer(1), list(range(5)))
    noter.begin(ROUTE_IDS)
    assert noter.take(step) is None
