"""RankRunner: one rank's part of a step. Conventional: the sequences at home here; the other ranks' tokens visit.

Knows plans and the model; knows no sockets.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution import forward_batch
from moe_serve.hf import experts
from moe_serve.parallel.modes.conventional import ConventionalLayers
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.wire import routes
from moe_serve.parallel.wire.messages import RankStep, Sampled
from moe_serve.parallel.wire.routes import RouteNoter
from moe_serve.scheduling.batch_plan import BatchPlan


class Outcome(NamedTuple):
    """What a rank has to say about a step."""

    sampled: dict[int, Sampled]
    """Tokens by index of the step's items."""
    errors: dict[int, str]
    """By index of the step's items."""
    routes: list[dict[str, Any]]
    """Pieces of the step's routes, if the front wants them."""


class RankRunner(Protocol):
    """One of the two modes."""

    def run(self, step: RankStep) -> Outcome: ...


class ConventionalRunner:
    """Each sequence's tokens are computed on its home; only experts are elsewhere."""

    def __init__(self, runner: ModelRunner, shared: ExpertShare) -> None:
        self._runner = runner
        self._layers = ConventionalLayers(shared)
        self._rank = shared.exchange.rank
        self._num_tokens = 0
        num_experts = runner.expert_layers.experts.store.num_experts
        self._tap = RouteNoter(self._layers, shared.layers, num_experts, lambda: torch.arange(self._num_tokens))
        experts.connect(runner.model, self._tap)

    def run(self, step: RankStep) -> Outcome:
        own = step.part_of(self._rank)
        if not own:
            for layer in self._layers.shared.layers:
                self._layers.join(layer)
            return Outcome({}, {}, [])
        plan = BatchPlan(tuple(step.plan.scheduled[i] for i in own))
        self._num_tokens = plan.num_tokens
        self._tap.begin(step.routes)
        result = self._runner.run(plan)
        failures = forward_batch.by_sequence(plan, self._layers.take_failures())
        sampled = [i for i in own if step.plan.scheduled[i].needs_sample]
        tokens = dict(zip(sampled, zip(result.token_ids, result.logprobs, strict=True), strict=True))
        messages = {seq: error.message for seq, error in failures.items()} | dict(result.errors)
        errors = {i: messages[s.seq] for i in own if (s := step.plan.scheduled[i]).seq in messages}
        return Outcome(tokens, errors, self._routes(step, plan, own))

    def _routes(self, step: RankStep, plan: BatchPlan, own: list[int]) -> list[dict[str, Any]]:
        if not step.routes:
            return []
        places = routes.spans(step.plan)
        return self._tap.take(routes.plan_numbers(plan, [places[i] for i in own]))
