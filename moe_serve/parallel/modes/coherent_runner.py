"""CoherentRunner: a rank's part of a step whose tokens move. Afterwards every rank has every new key and value.

Knows plans, the model and its KV cache; knows no sockets.

Shape alphabet: T tokens of the step.
"""

from __future__ import annotations

import torch

from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution import forward_batch
from moe_serve.execution.forward_batch import ForwardBatch, GroupLimits
from moe_serve.hf import experts
from moe_serve.parallel.modes.coherent import Meeting, numbers, read_numbers
from moe_serve.parallel.modes.coherent_layers import CoherentModel, Walk
from moe_serve.parallel.modes.context import ContextShare
from moe_serve.parallel.modes.expert_share import ExpertShare, LossNotes
from moe_serve.parallel.modes.runner import Outcome
from moe_serve.parallel.modes.step_rows import errors_of, sample_rows, start_ranks
from moe_serve.parallel.wire import routes
from moe_serve.parallel.wire.messages import RankStep
from moe_serve.parallel.wire.routes import RouteNoter


class CoherentRunner:
    """Decoding tokens end a layer where their experts ran; sampling happens where a token ends up."""

    def __init__(self, runner: ModelRunner, shared: ExpertShare) -> None:
        self._runner = runner
        self._exchange = shared.exchange
        self._losses = LossNotes()
        self._context = ContextShare(runner.kv_cache, shared.layers)
        self._model = CoherentModel(runner.model, shared, Meeting(shared, self._losses, self._context))
        num_experts = runner.expert_layers.experts.store.num_experts
        self._tap = RouteNoter(self._model.experts, shared.layers, num_experts, self._model.choosing_rows)
        experts.connect(runner.model, self._tap)

    def run(self, step: RankStep) -> Outcome:
        self._runner.relieve_memory()
        config, device = self._runner.config, self._runner.device
        batch = forward_batch.make(step.plan, config.kv.page_size, device, GroupLimits())
        walk = self._begin(step, batch)
        self._model.walk = walk
        self._tap.begin(step.routes)
        self._context.begin(batch.kv_slots, walk.visited)
        logits = self._runner.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=walk.keep,
            forward_batch=batch,
            kv_cache=self._runner.kv_cache,
        ).logits[0]
        self._share_rest()
        sampled, lost = sample_rows(self._runner, step, batch, walk.rows[walk.keep], logits)
        return Outcome(sampled, errors_of(step, self._losses) | lost, routes.whole_step(self._tap, step))

    def _begin(self, step: RankStep, batch: ForwardBatch) -> Walk:
        device = self._runner.device
        pinned = [item.count > 1 for item in forward_batch.order_for_batch(step.plan) for _ in range(item.count)]
        rows = (start_ranks(step, device) == self._exchange.rank).nonzero()[:, 0]
        return Walk(batch, rows, torch.tensor(pinned, device=device), torch.empty(0, dtype=torch.int64, device=device))

    def _share_rest(self) -> None:
        """Keys and values of dense layers after the last with experts, where a model has such."""
        layers = self._context.due(None)
        if not layers:
            return
        exchange = self._exchange
        context = self._context.packed(layers)
        header = numbers(self._context.counts(layers), context.device)
        exchange.book(0, "context", len(context) * len(exchange.others))
        exchange.book(0, "control", len(header) * len(exchange.others))
        message = torch.cat([header, context])
        for raw in exchange.trade(0, dict.fromkeys(exchange.others, message), exchange.others).values():
            self._context.take(layers, read_numbers(raw[: len(header)]), raw[len(header) :])
