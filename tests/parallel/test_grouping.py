"""Groups of ranks: each gets its part of a step, and counts ranks and items from zero."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.config import ParallelConfig
from moe_serve.errors import ConfigError
from moe_serve.parallel.modes.runner import Outcome, RankStep
from moe_serve.parallel.modes.table import GroupRunner
from moe_serve.parallel.wire.messages import RoutePiece
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence, StepError
from moe_serve.scheduling.sequence import Request, SamplingParams, Sequence

LOST = StepError("lost")


class Echo:
    """Samples each item's home, fails the second item, and is late with the first."""

    def run(self, step: RankStep) -> Outcome:
        errors = {1: LOST} if len(step.homes) > 1 else {}
        last_tokens = np.array([span.stop - 1 for span in step.plan.spans()], np.int32)
        piece = RoutePiece(last_tokens, np.zeros((len(last_tokens), 1, 1), np.uint8))
        return Outcome({i: (home, None) for i, home in enumerate(step.homes)}, errors, piece, (0,))


def step_of(homes: list[int]) -> RankStep:
    items = []
    for i, _ in enumerate(homes):
        seq = Sequence(Request(str(i), (7, 8, 9), SamplingParams()), 0, [7, 8, 9], 10)
        items.append(ScheduledSequence(seq, 0, 3))
    return RankStep(BatchPlan(tuple(items)), tuple(homes))


def test_a_group_runs_its_part() -> None:
    step = step_of([2, 0, 3, 1])
    first, second = (GroupRunner(Echo(), rank, 2).run(step) for rank in (0, 2))
    assert first[:2] == ({1: (0, None), 3: (1, None)}, {3: LOST})
    assert second[:2] == ({0: (0, None), 2: (1, None)}, {2: LOST})
    assert (first.late, second.late) == ((1,), (0,))
    assert [numbers(outcome) for outcome in (first, second)] == [[5, 11], [2, 8]]  # of the whole step's tokens
    assert GroupRunner(Echo(), 2, 2).run(step_of([0, 1])) == ({}, {}, None, ())


def numbers(outcome: Outcome) -> list[int]:
    """Which tokens an outcome's piece is about."""
    assert outcome.routes is not None
    return [int(row) for row in outcome.routes.rows]


def test_groups_must_divide_the_ranks() -> None:
    parallel = ParallelConfig(devices=4, ep_groups=2)
    assert (parallel.ranks_per_group, [parallel.group_of(rank) for rank in range(4)]) == (2, [0, 0, 1, 1])
    with pytest.raises(ConfigError, match="--ep-groups 3 does not divide --devices 4"):
        ParallelConfig(devices=4, ep_groups=3)


def test_context_is_recomputed() -> None:
    for context in ("recompute", "auto"):
        ParallelConfig(devices=2, ep_mode="coherent", ep_context=context)
    with pytest.raises(ConfigError, match=r"--ep-context send: .* has been removed.*; use --ep-context recompute"):
        ParallelConfig(devices=2, ep_mode="coherent", ep_context="send")
    with pytest.raises(ConfigError, match="--ep-context: 'some' is not recompute"):
        ParallelConfig(devices=2, ep_context="some")
