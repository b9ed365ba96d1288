"""StepRecorder: stamps sequences with times and reports one step to the StatsObserver.

Keeps measuring out of the engine's three-line heart. Knows no metrics library.
"""

from __future__ import annotations

import time

from expert_cache.report import ExpertTotals
from expert_cache.running.experts import ExpertsControl
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve.scheduling.finish import FinishedStats
from moe_serve.scheduling.sequence import SampleOutput, Sequence
from moe_serve.scheduling.stats import StatsObserver, StepStats


class StepRecorder:
    """Lives for one step: `planned` before the model runs, `stamp` when its result is booked, `report` at the end."""

    def __init__(self, experts: ExpertsControl, observer: StatsObserver | None) -> None:
        self._start = self._end = time.monotonic()
        self._num_generated = self._num_accepted = 0
        self._experts = experts
        self._observer = observer
        self._plan = BatchPlan(())
        self._num_prompt_tokens = 0
        self._experts_before = self._expert_totals()
        self._gaps: tuple[float, ...] = ()
        self._firsts: tuple[float, ...] = ()

    def _expert_totals(self) -> ExpertTotals:
        """So far; zeros without an observer, because a GPU has to be asked."""
        return ExpertTotals() if self._observer is None else self._experts.totals()

    def planned(self, plan: BatchPlan) -> None:
        """Note what is about to run, while each sequence still shows its state before the step."""
        self._plan = plan
        for item in plan.scheduled:
            if item.seq.first_scheduled_s is None:
                item.seq.first_scheduled_s = self._start
        self._num_prompt_tokens = sum(i.count for i in plan.scheduled if i.start < i.seq.num_prompt)

    def stamp(self, advanced: list[Sequence], now: float) -> None:
        """Give the sequences that got a token at time `now` their times."""
        self._end = now
        self._num_generated = sum(seq.num_new for seq in advanced)
        self._num_accepted = sum(max(0, item.seq.num_new - 1) for item in self._plan.scheduled if item.drafts)
        self._gaps = tuple(now - s.last_token_s for s in advanced if s.last_token_s is not None)
        self._firsts = tuple(now - s.request.arrival_time_s for s in advanced if s.first_token_s is None)
        for seq in advanced:
            seq.first_token_s = seq.first_token_s or now
            seq.last_token_s = now

    def report(self, outputs: list[SampleOutput]) -> None:
        """Tell the observer about the step and the samples that it ended."""
        if self._observer is None:
            return
        self._observer.on_step(self._step_stats())
        for output in outputs:
            if output.stats is not None:
                self._observer.on_finished(output.stats)

    def _step_stats(self) -> StepStats:
        return StepStats(
            duration_s=self._end - self._start,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated,
            num_preemptions=len(self._plan.preempted),
            prefix_queried_tokens=self._plan.prefix_queried_tokens,
            prefix_hit_tokens=self._plan.prefix_hit_tokens,
            inter_token_s=self._gaps,
            time_to_first_token_s=self._firsts,
            experts=self._expert_totals().since(self._experts_before),
            num_restored_states=self._plan.num_restored,
            num_drafted_tokens=self._plan.num_drafts,
            num_accepted_tokens=self._num_accepted,
        )


def finished_stats(seq: Sequence, now: float) -> FinishedStats:
    """Times of one finished sample; phases it never reached count as zero."""
    assert seq.finish_reason is not None
    arrival = seq.request.arrival_time_s
    scheduled = seq.first_scheduled_s or now
    first = seq.first_token_s or now
    return FinishedStats(
        finish_reason=seq.finish_reason,
        num_prompt_tokens=seq.num_prompt,
        num_output_tokens=seq.num_generated,
        max_tokens=seq.params.max_tokens,
        n=seq.params.n,
        e2e_s=now - arrival,
        queue_s=scheduled - arrival,
        prefill_s=first - scheduled,
        decode_s=(seq.last_token_s or first) - first,
    )
