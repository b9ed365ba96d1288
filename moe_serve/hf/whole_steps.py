"""WholeSteps: decoding steps of few sequences on a CPU, without the model's modules.

The kernel runs all layers in one call where every expert is in place; else it runs each layer up to its experts, and
whoever brings experts runs those. Steps with a part of a prompt, or with more sequences, stay with the modules. The
counterpart of decode_graphs.py. Knows steps and kernels; nothing of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from expert_cache.layers import ExpertLayers
from moe_serve.execution.forward_batch import ForwardBatch
from moe_serve.execution.kv_cache import KVCache
from moe_serve.hf import decoder_blocks
from moe_serve.hf.loading import LoadedModel
from moe_serve_kernels.cpu import decode_step
from moe_serve_kernels.cpu.decode_step import MOST_TOKENS, DecodeInputs, DecodeStep
from predictors.methods.next_gate import Router

log = logging.getLogger(__name__)


class RotaryTable:
    """Cosines and sines [positions, D / 2] of a model's rotary embedding, made as positions are reached."""

    def __init__(self, embedding: Any, head_dim: int) -> None:
        """`embedding`: the model's own, called with positions."""
        self._embedding = embedding
        self._half = head_dim // 2
        self._cos = self._sin = torch.empty(0, self._half)

    def at(self, positions: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of `positions` [T], none beyond `last`."""
        if last >= len(self._cos):
            self._grow(max(2 * len(self._cos), last + 1, 512))
        return self._cos[positions], self._sin[positions]

    def _grow(self, count: int) -> None:
        # A family that repeats the values for both halves of a head and one that does not are alike here.
        cos, sin = self._embedding(self._cos, torch.arange(count)[None])
        self._cos, self._sin = (t[0, :, : self._half].contiguous() for t in (cos, sin))


class WholeSteps:
    """One model's decoding steps."""

    def __init__(self, model: Any, step: DecodeStep, layers: ExpertLayers, head_dim: int, has_experts: bool) -> None:
        """`has_experts`: every block of `step` has its experts; else `layers` runs them."""
        self._embed = model.model.embed_tokens
        self._step = step
        self._layers = layers
        self._rotary = RotaryTable(model.model.rotary_emb, head_dim)
        self._has_experts = has_experts

    def takes(self, batch: ForwardBatch) -> bool:
        """Every sequence decodes one token, and they are few."""
        return batch.num_tokens <= MOST_TOKENS and not batch.prefill_runs and len(batch.decode_groups) == 1

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [rows to sample, V] of a batch that `takes` takes; overwritten by the next step of as many tokens."""
        (group,) = batch.decode_groups
        cos, sin = self._rotary.at(batch.positions[0], group.max_length - 1)
        x = self._embed(batch.input_ids[0])
        inputs = DecodeInputs(x, cos, sin, batch.kv_slots, group.page_table, group.lengths)
        logits = self._run_at_once(inputs) if self._has_experts else self._run_by_layer(inputs)
        return logits if len(batch.sample_rows) == batch.num_tokens else logits[batch.sample_rows]

    def _run_at_once(self, inputs: DecodeInputs) -> torch.Tensor:
        logits, ids, weights = self._step.run(inputs)
        self._layers.have_run(ids, weights)
        return logits

    def _run_by_layer(self, inputs: DecodeInputs) -> torch.Tensor:
        for i, layer in enumerate(self._layers.experts.store.layers):
            hidden, ids, weights = self._step.attention(i, inputs)
            inputs.x.add_(self._layers.run(layer, hidden, ids, weights))
        return self._step.head(inputs)


def whole_steps(
    loaded: LoadedModel, kv_cache: KVCache, layers: ExpertLayers, routers: Sequence[Router], page_size: int
) -> WholeSteps | None:
    """For models on a CPU in float32 whose layers the kernel knows; None, and a line in the log, for others."""
    model: Any = loaded.model
    family, config = loaded.family, loaded.hf_config
    reason = decoder_blocks.why_not(family, config)
    if reason is None and len(routers) != len(model.model.layers):
        reason = "not every layer has experts"
    if reason is not None:
        log.info("decoding steps run through the model's modules: %s", reason)
        return None
    shape = decoder_blocks.shape_of(model, family, config, layers.compute.activation, page_size)
    blocks = decoder_blocks.blocks_of(model, config, kv_cache, routers, layers.in_place)
    step = DecodeStep(shape, blocks, model.model.norm.weight, decoder_blocks.weights_of(model.lm_head))
    return WholeSteps(model, step, layers, shape.head_dim, has_experts=bool(layers.in_place))


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when this machine has the kernel for activations of `dtype`."""
    return decode_step.is_available(device, dtype)
