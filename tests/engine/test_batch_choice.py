"""Which sequences decode when a step is too narrow: overlap of experts, bounded waiting, and when not to bother."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError
from moe_serve.expert_routes.usage_forecast import UsageForecast
from moe_serve.scheduling.batch_choice import ExpertAware, FirstComeFirstServed, choosing_pays
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence, StepResult, StepRoutes
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import Sequence
from predictors.predictor import RouterShape

from .driving import MakeDriver, MakeSeq

E = 12


class Fixed:
    """Every sequence always uses the experts of its prompt."""

    def of(self, sequences: list[Sequence]) -> npt.NDArray[np.float32]:
        rows = np.zeros((len(sequences), E), np.float32)
        for row, seq in zip(rows, sequences, strict=True):
            row[list(seq.request.prompt_token_ids)] = 1
        return rows


@pytest.fixture
def groups(make_seq: MakeSeq) -> list[Sequence]:
    """Six sequences, alternately using experts 0-2 and 6-8."""
    return [make_seq([0, 1, 2] if i % 2 == 0 else [6, 7, 8]) for i in range(6)]


def test_sequences_that_share_experts_go_together(groups: list[Sequence]) -> None:
    choice = ExpertAware(Fixed(), max_skipped=100)
    first = choice.choose(groups, 3)
    assert first == groups[::2]
    assert choice.choose(groups, 3) == groups[1::2]  # they have waited longest


def test_among_equals_the_resident_ones_come_first(make_seq: MakeSeq) -> None:
    seqs = [make_seq([0, 1]), make_seq([2, 3]), make_seq([4, 5]), make_seq([6, 7])]
    resident = np.zeros(E, np.bool_)
    resident[[6, 7]] = True
    assert ExpertAware(Fixed(), 100, lambda: resident).choose(seqs, 2) == [seqs[0], seqs[3]]


def test_nobody_is_passed_over_more_often_than_allowed(groups: list[Sequence], make_seq: MakeSeq) -> None:
    """A lone sequence that shares nothing with the many others."""
    lone = make_seq([11])
    seqs = [*groups[::2], lone, *[make_seq([0, 1, 2]) for _ in range(4)]]
    choice = ExpertAware(Fixed(), max_skipped=5)
    waits = []
    skipped = dict.fromkeys(seqs, 0)
    for _ in range(60):
        chosen = choice.choose(seqs, 2)
        assert len(set(chosen)) == 2
        for seq in seqs:
            skipped[seq] = 0 if seq in chosen else skipped[seq] + 1
        waits.append(max(skipped.values()))
    assert max(waits) <= 5 + len(seqs) // 2  # more than `width` may come due in the same step


def test_where_it_cannot_pay_turns_are_taken(groups: list[Sequence]) -> None:
    choice = ExpertAware(Fixed(), 100, can_pay=lambda width: False)
    assert choice.choose(groups, 3) == groups[:3]
    assert choice.choose(groups, 3) == groups[3:]


def test_first_come_first_served(groups: list[Sequence]) -> None:
    assert FirstComeFirstServed().choose(groups, 2) == groups[:2]


@pytest.mark.parametrize(
    ("experts", "top_k", "width", "resident_frac", "pays"),
    [(64, 6, 8, 0.25, True), (128, 8, 8, 0.5, True), (64, 6, 8, 1.0, False), (8, 2, 8, 0.25, False),
     (64, 6, 64, 0.25, False), (64, 6, 1, 0.25, False)],
)  # fmt: skip
def test_when_choosing_pays(experts: int, top_k: int, width: int, resident_frac: float, pays: bool) -> None:
    assert choosing_pays(experts, top_k, width, resident_frac) is pays


def test_a_narrow_step_decodes_some_and_all_finish(make_driver: MakeDriver, make_seq: MakeSeq) -> None:
    driver = make_driver(max_num_batched_seqs=2)
    driver.scheduler.choice = ExpertAware(Fixed(), max_skipped=4)
    seqs = [make_seq([i % 3, i % 4], max_tokens=6) for i in range(7)]
    for seq in seqs:
        driver.scheduler.add(seq)
    driver.run()
    decoding = [[s for s in plan.scheduled if s.start >= s.seq.num_prompt] for plan in driver.plans]
    assert max(len(items) for items in decoding) == 2
    assert all(seq.num_generated == 6 for seq in seqs)


def routed(seq: Sequence, start: int, ids: list[list[list[int]]]) -> tuple[BatchPlan, StepResult]:
    plan = BatchPlan((ScheduledSequence(seq, start, len(ids)),))
    return plan, StepResult((), (), routes=StepRoutes(np.array(ids), None, (slice(0, len(ids)),)))


def test_usage_forecast_follows_the_newest_tokens_and_forgets_the_finished(make_seq: MakeSeq) -> None:
    forecast = UsageForecast(RouterShape((0, 1), num_experts=4, top_k=1))
    seq = make_seq([1, 2])
    assert not forecast.of([seq]).any()
    forecast.on_routes(*routed(seq, 0, [[[0], [3]], [[1], [3]]]))
    row = forecast.of([seq])[0].reshape(2, 4)
    assert row[0, 1] > row[0, 0] > 0
    np.testing.assert_allclose(row[1], [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(row.sum(axis=1), 1, atol=1e-6)
    seq.finish_reason = FinishReason.STOP
    forecast.on_routes(*routed(seq, 2, [[[2], [2]]]))
    assert not forecast.of([seq]).any()


def test_on_without_a_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to choose without --max-num-batched-seqs"):
        EngineConfig.of(expert_aware_batching="on")
