"""RankRunner: one rank's part of a step. Conventional: the sequences at home here; the other ranks' tokens visit.

Knows plans and the model; knows no sockets.
"""

from __future__ import annotations

from typing import Protocol

from moe_serve import forward_batch
from moe_serve.batch_plan import BatchPlan
from moe_serve.hf import experts
from moe_serve.model_runner import ModelRunner
from moe_serve.parallel.conventional import ConventionalLayers
from moe_serve.parallel.messages import RankStep, Sampled
from moe_serve.parallel.sharing import SharedLayers

Outcome = tuple[dict[int, Sampled], dict[int, str]]
"""Sampled tokens and errors, by index of the step's items."""


class RankRunner(Protocol):
    """One of the two modes."""

    def run(self, step: RankStep) -> Outcome: ...


class ConventionalRunner:
    """Each sequence's tokens are computed on its home; only experts are elsewhere."""

    def __init__(self, runner: ModelRunner, shared: SharedLayers) -> None:
        self._runner = runner
        self._layers = ConventionalLayers(shared)
        self._rank = shared.exchange.rank
        experts.connect(runner.model, self._layers)

    def run(self, step: RankStep) -> Outcome:
        own = step.part_of(self._rank)
        if not own:
            for layer in self._layers.shared.layers:
                self._layers.join(layer)
            return {}, {}
        plan = BatchPlan(tuple(step.plan.scheduled[i] for i in own))
        result = self._runner.run(plan)
        failures = forward_batch.by_sequence(plan, self._layers.take_failures())
        sampled = [i for i in own if step.plan.scheduled[i].needs_sample]
        tokens = dict(zip(sampled, zip(result.token_ids, result.logprobs, strict=True), strict=True))
        errors = {i: failures[s.seq].message for i in own if (s := step.plan.scheduled[i]).seq in failures}
        return tokens, errors
