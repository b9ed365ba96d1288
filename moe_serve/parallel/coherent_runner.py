"""CoherentRunner: a rank's part of a step whose tokens move. Afterwards every rank has every new key and value.

Knows plans, the model and its KV cache; knows no sockets.

Shape alphabet: T tokens of the step, L decoder layers, G ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_serve import forward_batch, sampler
from moe_serve.forward_batch import ForwardBatch, GroupLimits
from moe_serve.hf import experts
from moe_serve.kv_cache import LayerKV
from moe_serve.model_runner import ModelRunner
from moe_serve.parallel import routes
from moe_serve.parallel.coherent import Meeting
from moe_serve.parallel.coherent_layers import CoherentModel, Walk
from moe_serve.parallel.exchange import pack, unpack
from moe_serve.parallel.messages import RankStep, Sampled
from moe_serve.parallel.rank_runner import Outcome
from moe_serve.parallel.routes import RouteTap
from moe_serve.parallel.sharing import LossNotes, SharedLayers


class CoherentRunner:
    """Decoding tokens end a layer where their first choice ran; sampling happens where a token ends up."""

    def __init__(self, runner: ModelRunner, shared: SharedLayers) -> None:
        self._runner = runner
        self._exchange = shared.exchange
        self._losses = LossNotes()
        self._model = CoherentModel(runner.model, shared, Meeting(shared, self._losses))
        num_experts = runner.expert_layers.experts.store.num_experts
        self._tap = RouteTap(self._model.experts, shared.layers, num_experts, self._model.choosing_rows)
        experts.connect(runner.model, self._tap)

    def run(self, step: RankStep) -> Outcome:
        self._runner.relieve_memory()
        config, device = self._runner.config, self._runner.device
        batch = forward_batch.make(step.plan, config.block_size, device, GroupLimits())
        walk = self._begin(step, batch)
        self._model.walk = walk
        self._tap.begin(step.routes)
        logits = self._runner.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=walk.keep,
            forward_batch=batch,
            kv_cache=self._runner.kv_cache,
        ).logits[0]
        self._share_context(walk)
        sampled, gave_up = self._sample(step, walk, logits)
        return Outcome(sampled, self._errors(step) | gave_up, self._routes(step))

    def _routes(self, step: RankStep) -> list[dict[str, Any]]:
        if not step.routes:
            return []
        return self._tap.take(routes.plan_numbers(step.plan, routes.spans(step.plan)))

    def _begin(self, step: RankStep, batch: ForwardBatch) -> Walk:
        starts: list[int] = []
        pinned: list[bool] = []
        begins = {id(item): start for item, start in zip(step.plan.scheduled, step.starts, strict=True)}
        for item in forward_batch.order_for_batch(step.plan):
            starts += [begins[id(item)]] * item.count
            pinned += [item.count > 1] * item.count
        device = self._runner.device
        rows = (torch.tensor(starts, device=device) == self._exchange.rank).nonzero()[:, 0]
        return Walk(batch, rows, torch.tensor(pinned, device=device), torch.empty(0, dtype=torch.int64, device=device))

    def _sample(self, step: RankStep, walk: Walk, logits: torch.Tensor) -> tuple[dict[int, Sampled], dict[int, str]]:
        """Tokens of the sequences whose last row is here, and which of these a grammar lost, by index of the items.

        Which rank samples is known only now, so masks are not computed beside the forward pass.
        """
        if not len(logits):
            return {}, {}
        wanted = [i for i, item in enumerate(step.plan.scheduled) if item.needs_sample]
        of_row = dict(zip(walk.batch.sample_rows.tolist(), walk.batch.sample_order, strict=True))
        items = [wanted[of_row[row]] for row in walk.rows[walk.keep].tolist()]
        seqs = [step.plan.scheduled[i].seq for i in items]
        pending = self._runner.masks.start(seqs)
        masks = pending.result() if pending is not None else None
        tokens, logprobs = sampler.sample(logits, seqs, self._runner.config.seed, self._runner.eos_token_ids, masks)
        errors = {} if masks is None else masks.errors
        lost = {i: errors[seq] for i, seq in zip(items, seqs, strict=True) if seq in errors}
        return dict(zip(items, zip(tokens, logprobs, strict=True), strict=True)), lost

    def _errors(self, step: RankStep) -> dict[int, str]:
        failed = forward_batch.by_sequence(step.plan, self._losses.take())
        return {i: failed[item.seq].message for i, item in enumerate(step.plan.scheduled) if item.seq in failed}

    def _share_context(self, walk: Walk) -> None:
        """Give every other rank the keys and values that were computed here, all layers in one collective."""
        exchange, layers = self._exchange, self._runner.kv_cache.layers
        slots, widths = walk.batch.kv_slots, [_row_bytes(layer) for layer in layers.values()]
        sent = torch.cat([_read(layer, walk.visited[i], slots).flatten() for i, layer in layers.items()])[:, None]
        numbers = exchange.counts(0, [len(walk.visited[i]) for i in layers])
        numbers[exchange.rank] = [0] * len(layers)
        parts = [sent] * exchange.num_ranks
        parts[exchange.rank] = sent[:0]
        pieces = [[n * w for n, w in zip(row, widths, strict=True)] for row in numbers]
        received = exchange.swap(0, "context", parts, [sum(sizes) for sizes in pieces])
        for raw, sizes in zip(received, pieces, strict=True):
            for layer, width, piece in zip(layers.values(), widths, torch.split(raw[:, 0], sizes), strict=True):
                if len(piece):
                    _write(layer, piece.view(-1, width), slots)


def _row_bytes(layer: LayerKV) -> int:
    heads, _, key_dim = layer.keys.shape
    return 4 + heads * (key_dim + layer.values.shape[2]) * layer.keys.element_size()


def _read(layer: LayerKV, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Packed row numbers, keys and values of `rows` [n]: [n, W]."""
    keys, values = (data[:, slots[rows]].transpose(0, 1).flatten(1) for data in (layer.keys, layer.values))
    return pack(rows.int(), keys, values)


def _write(layer: LayerKV, raw: torch.Tensor, slots: torch.Tensor) -> None:
    heads, _, key_dim = layer.keys.shape
    value_dim, dtype = layer.values.shape[2], layer.keys.dtype
    rows, keys, values = unpack(raw, (1, torch.int32), (heads * key_dim, dtype), (heads * value_dim, dtype))
    by_head = (part.view(len(raw), heads, -1).transpose(0, 1) for part in (keys, values))
    layer.write(slots[rows[:, 0].long()], *by_head)
