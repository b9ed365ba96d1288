"""Routes of a step from several ranks' pieces. No processes."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from expert_cache.running.usage import RouteBuffer
from moe_serve.parallel.front.step_writer import gather
from moe_serve.parallel.modes.route_pieces import begin_step, piece, plan_numbers
from moe_serve.parallel.wire.messages import NO_ROUTES, ROUTE_IDS, ROUTE_IDS_AND_WEIGHTS, RoutePiece, encode, restore
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence
from predictors.predictor import RouterShape
from predictors.shape import MoELayer

LAYERS = (MoELayer(1), MoELayer(3))
SHAPE = RouterShape(LAYERS, num_experts=8, top_k=2)


@pytest.fixture
def plan() -> BatchPlan:
    """A prompt of 3, then two decoding sequences: in the batch these come first, the shorter context before."""
    seqs = [Sequence(Request(f"{n}", tuple(range(n)), SamplingParams()), 0, list(range(n)), 20) for n in (3, 9, 5)]
    runs = ((0, 3), (8, 1), (4, 1))
    return BatchPlan(tuple(ScheduledSequence(seq, *run) for seq, run in zip(seqs, runs, strict=True)))


def chosen(token: int, layer: int) -> list[int]:
    """Other experts for every token and layer."""
    return [(token + layer) % 8, (token + layer + 4) % 8]


def chosen_in(wanted: int, tokens: list[int], num_layers: int = len(LAYERS)) -> RouteBuffer:
    """The buffer of a step in which routers chose for the tokens with these plan-order numbers."""
    routes = RouteBuffer(num_layers, SHAPE.num_experts)
    begin_step(routes, wanted)
    for layer in LAYERS[:num_layers]:
        ids = torch.tensor([chosen(token, layer) for token in tokens])
        routes.add(ids, ids / 8)
    return routes


def expected() -> list[Any]:
    return [[chosen(token, layer) for layer in LAYERS] for token in range(5)]


def told(*pieces: RoutePiece | None) -> list[RoutePiece]:
    """What arrives at the front."""
    return [msgspec.msgpack.decode(encode(p), type=RoutePiece, dec_hook=restore) for p in pieces if p is not None]


def test_conventional_ranks_tell_of_their_own_sequences(plan: BatchPlan) -> None:
    """Rank 0 has the prompt, rank 1 the others, in the order of its batch: the shorter context first."""
    pieces = []
    for own, tokens in (([0], [0, 1, 2]), ([1, 2], [4, 3])):
        pieces.append(piece(plan, own, *chosen_in(ROUTE_IDS_AND_WEIGHTS, tokens).take()))
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
        routes = chosen_in(ROUTE_IDS, numbers.tolist())
        pieces.append(piece(plan, range(3), *routes.take(), np.array(at_home)))
    found = gather(plan, told(*pieces), SHAPE, ROUTE_IDS)
    assert found.ids.tolist() == expected()
    assert found.weights is None


def test_a_rank_that_forgets_something_is_noticed(plan: BatchPlan) -> None:
    found = piece(plan, range(3), *chosen_in(ROUTE_IDS, list(range(5)), num_layers=1).take())
    with pytest.raises(AssertionError, match=r"routes of shape \(5, 1, 2\) instead of \(5, 2, 2\)"):
        gather(plan, told(found), SHAPE, ROUTE_IDS)
    with pytest.raises(AssertionError, match="the routes of 0 tokens instead of 5"):
        gather(plan, [], SHAPE, ROUTE_IDS)


def test_a_rank_without_tokens_at_home_tells_nothing(plan: BatchPlan) -> None:
    routes = chosen_in(ROUTE_IDS, list(range(5)))
    assert piece(plan, range(3), *routes.take(), np.array([], np.int64)) is None


def test_nothing_is_kept_unless_wanted_and_nothing_of_a_failed_step(plan: BatchPlan) -> None:
    routes = chosen_in(NO_ROUTES, list(range(5)))
    assert not routes.is_on
    failed = chosen_in(ROUTE_IDS, list(range(5)))
    begin_step(failed, ROUTE_IDS)
    for unwanted in (routes, failed):
        with pytest.raises(AssertionError, match="a layer's router was not seen"):
            unwanted.take()
