"""Helpers for scheduler and engine tests: sequences from plain numbers, a scheduler driven without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_serve.scheduling.batch_plan import BatchPlan, StepResult
from moe_serve.scheduling.kv_pages import PagePool
from moe_serve.scheduling.scheduler import Scheduler
from moe_serve.scheduling.sequence import Request, SamplingParams, TokenLogprob
from moe_serve.scheduling.sequence import Sequence as Seq
from moe_serve.scheduling.step_draft import SchedulerLimits

MakeSeq = Callable[..., Seq]


def make_seq(prompt: Sequence[int], max_tokens: int = 8, request_id: str = "r", **params: Any) -> Seq:
    request = Request(request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens, **params))
    return Seq(request, 0, list(prompt), len(prompt) + max_tokens)


class SchedulerDriver:
    """Runs a scheduler with a model that always samples `position + 1000`."""

    def __init__(
        self, num_pages: int = 64, page_size: int = 4, eos: frozenset[int] = frozenset(), **limits: Any
    ) -> None:
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32} | limits
        self.pool = PagePool(num_pages, page_size)
        self.scheduler = Scheduler(SchedulerLimits(**settings), self.pool, eos)
        self.plans: list[BatchPlan] = []
        self.scored: list[list[list[int]]] = []
        """For each step, the scored positions of each scheduled sequence."""

    def step(self) -> BatchPlan:
        plan = self.scheduler.schedule()
        sampled = [s for s in plan.scheduled if s.needs_sample]
        self.scored.append([list(s.scored) for s in plan.scheduled])
        scores = {s.seq: tuple(TokenLogprob(s.seq.token_ids[p + 1], -1.0) for p in s.scored) for s in plan.scheduled}
        tokens = tuple(s.end + 1000 for s in sampled)
        result = StepResult(tokens, tuple(None for _ in sampled), prompt_logprobs=scores)
        self.scheduler.update(plan, result)
        self.plans.append(plan)
        self.pool.check_integrity(s.page_ids for s in self.scheduler.live())
        return plan

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError("the scheduler did not finish")


MakeDriver = type[SchedulerDriver]
