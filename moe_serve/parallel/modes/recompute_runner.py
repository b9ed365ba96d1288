"""RecomputingRunner: a rank's part of a step that every rank computes whole, but for the experts of others.

Knows plans and the model; knows no sockets.

Shape alphabet: T tokens of the step.
"""

from __future__ import annotations

import torch

from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution import forward_batch
from moe_serve.execution.forward_batch import GroupLimits
from moe_serve.hf import experts
from moe_serve.parallel.modes.expert_share import ExpertShare, LossNotes
from moe_serve.parallel.modes.recompute import RecomputingLayers
from moe_serve.parallel.modes.runner import Outcome
from moe_serve.parallel.modes.step_rows import errors_of, sample_rows, start_ranks
from moe_serve.parallel.wire import routes
from moe_serve.parallel.wire.messages import RankStep
from moe_serve.parallel.wire.routes import RouteNoter


class RecomputingRunner:
    """All ranks walk through all tokens; a token is sampled where it began."""

    def __init__(self, runner: ModelRunner, shared: ExpertShare) -> None:
        self._runner = runner
        self._rank = shared.exchange.rank
        self._losses = LossNotes()
        self._layers = RecomputingLayers(shared, self._losses, max(runner.kv_cache.layers))
        self._own = torch.empty(0, dtype=torch.int64)
        num_experts = runner.expert_layers.experts.store.num_experts
        self._tap = RouteNoter(self._layers, shared.layers, num_experts, lambda: self._own)
        experts.connect(runner.model, self._tap)

    def run(self, step: RankStep) -> Outcome:
        self._runner.relieve_memory()
        config, device = self._runner.config, self._runner.device
        batch = forward_batch.make(step.plan, config.kv.page_size, device, GroupLimits())
        homes = start_ranks(step, device)
        self._layers.begin(homes, batch.sample_rows)
        self._own = (homes == self._rank).nonzero()[:, 0]
        self._tap.begin(step.routes)
        rows = batch.sample_rows[homes[batch.sample_rows] == self._rank]
        logits: torch.Tensor = self._runner.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=rows,
            forward_batch=batch,
            kv_cache=self._runner.kv_cache,
        ).logits[0]
        sampled, lost = sample_rows(self._runner, step, batch, rows, logits)
        return Outcome(sampled, errors_of(step, self._losses) | lost, routes.whole_step(self._tap, step))
