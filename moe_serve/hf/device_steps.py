"""DeviceSteps: steps on a GPU without the model's modules, in 11 to 18 launches a layer where those take 47 to 65.

For families whose layers are plain (Family.plain_layers). A layer is a norm, attention, a norm, and experts or an MLP;
each norm also adds what came before it to the residual stream. Prompts and decoding tokens share every launch but those
of attention, so the number of launches does not grow with the number of sequences. A decoding step asks the host
nothing, so that a graph can hold it. The counterpart of whole_steps.py for CPUs. Knows steps; nothing of requests.

Shape alphabet: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expert_cache.running.experts import Experts
from moe_serve.execution.forward_batch import ForwardBatch
from moe_serve.execution.kv_cache import KVCache
from moe_serve.hf import decoder_blocks, rope
from moe_serve.hf.dense import StoredLinear
from moe_serve.hf.device_attention import HeadAttention, LatentAttention, step_of
from moe_serve.hf.device_mlp import DenseMLP, RoutedExperts
from moe_serve.hf.device_routers import DeviceRouter, router_in
from moe_serve.hf.experts import moe_layers
from moe_serve.hf.family import Family
from moe_serve.hf.fused_weights import fuse
from moe_serve.hf.loading import LoadedModel
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve_kernels.gpu.add_norm import NOTHING, Added, add_norm
from moe_serve_kernels.gpu.rotary import Turns
from moe_serve_kernels.routings import Routing
from predictors.shape import MoELayer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    attention: HeadAttention | LatentAttention
    post_norm: torch.Tensor
    mlp: DenseMLP | RoutedExperts


class DeviceSteps:
    """One model's steps. `why_not` must be None."""

    def __init__(
        self, loaded: LoadedModel, kv_cache: KVCache, experts: Experts[BatchPlan], page_size: int, max_model_len: int
    ) -> None:
        """Joins weights that read the same input; the model's modules go on working."""
        model, config = loaded.model, loaded.hf_config
        parts: Any = model
        activation = loaded.family.activation(config)
        self._shape = decoder_blocks.shape_of(parts, loaded.family, config, activation, page_size)
        layers = moe_layers(model)
        self._layers = [
            self._layer(layer, config, kv_cache, experts, i, layers) for i, layer in enumerate(parts.model.layers)
        ]
        self._embed = parts.model.embed_tokens
        self._norm: torch.Tensor = parts.model.norm.weight.detach()
        self._head = fuse([parts.lm_head])
        self._cos, self._sin = _table(parts.model.rotary_emb, self._norm.device, max_model_len, self._shape.rotary_dim)
        latents = isinstance(self._layers[0].attention, LatentAttention)
        self._heads_per_key = 1 if latents else self._shape.heads // self._shape.kv_heads
        self._embedding_scale: float = getattr(config, "embedding_multiplier", 1.0)
        self._logits_divisor: float = getattr(config, "logits_scaling", 1.0)

    def _layer(
        self,
        layer: Any,
        config: Any,
        kv_cache: KVCache,
        experts: Experts[BatchPlan],
        index: int,
        layers: Mapping[int, MoELayer],
    ) -> _Layer:
        kv = kv_cache.layers[index]
        attention: HeadAttention | LatentAttention
        if kv.shape.values_in_keys:
            attention = LatentAttention(layer.self_attn, self._shape, kv)
        else:
            window = decoder_blocks.window_of(layer.self_attn, config, index)
            attention = HeadAttention(layer.self_attn, self._shape, kv, window)
        mlp = _mlp_of(layer)
        norms = (layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach())
        return _Layer(norms[0], attention, norms[1], self._mlp(mlp, layers.get(index), experts))

    def _mlp(self, module: Any, layer: MoELayer | None, experts: Experts[BatchPlan]) -> DenseMLP | RoutedExperts:
        activation = self._shape.activation
        if layer is None:
            return DenseMLP(module, activation)
        router = router_in(module, self._shape.routing)
        assert router is not None
        shared = next((getattr(module, name, None) for name in decoder_blocks.SHARED if hasattr(module, name)), None)
        gate = getattr(module, "shared_expert_gate", None)
        return RoutedExperts(
            router,
            layer,
            experts,
            None if shared is None else DenseMLP(shared, activation),
            None if gate is None else fuse([gate]),
        )

    def run(self, batch: ForwardBatch, rows: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of the tokens `rows` [n]."""
        x = self._embed(batch.input_ids[0])
        if self._embedding_scale != 1:
            x = x * self._embedding_scale
        turns = Turns(self._cos, self._sin, batch.positions[0], self._shape.rotary)
        step = step_of(batch, turns, self._heads_per_key, x.dtype)
        added = NOTHING
        for layer in self._layers:
            hidden = self._add_norm(x, layer.input_norm, added)
            added = Added(layer.attention.run(hidden, step))
            wide = self._wide(x, layer.mlp.router)
            hidden = self._add_norm(x, layer.post_norm, added, wide)
            added = layer.mlp.run(hidden, wide)
        hidden = self._add_norm(x, self._norm, added)
        logits = self._head(hidden if _is_every_row(batch, rows) else hidden[rows])
        return logits if self._logits_divisor == 1 else logits.div_(self._logits_divisor)

    def _add_norm(
        self, x: torch.Tensor, weight: torch.Tensor, added: Added, wide: torch.Tensor | None = None
    ) -> torch.Tensor:
        return add_norm(x, weight, self._shape.norm_eps, added, self._shape.residual_scale, wide)

    def _wide(self, x: torch.Tensor, router: DeviceRouter | None) -> torch.Tensor | None:
        """Room for the router's input, if it wants another type than the layer's."""
        if router is None or router.logits_dtype == x.dtype:
            return None
        return torch.empty(x.shape, dtype=router.logits_dtype, device=x.device)


def _is_every_row(batch: ForwardBatch, rows: torch.Tensor) -> bool:
    """Each token of a decoding step, in the step's order."""
    return rows is batch.sample_rows and not batch.prefill_runs and len(rows) == batch.num_tokens


def _table(embedding: Any, device: torch.device, positions: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, rotary_dim / 2] float32 of the model's own rotary embedding."""
    like = torch.empty(0, dtype=torch.float32, device=device)
    cos, sin = (part.float().contiguous() for part in rope.table_of(embedding, like, positions, rotary_dim // 2))
    return cos, sin


def why_not(model: nn.Module, family: Family, config: Any) -> str | None:
    """Why a model's steps run module by module on a GPU; None: they need not."""
    reason, routing = decoder_blocks.why_unknown(family, config), family.routing(config)
    if reason is not None or routing is None:
        return reason
    if any(isinstance(module, StoredLinear) for module in model.modules()):
        return "its weights are kept as they are stored"
    if not all(_has_router(layer, routing) for layer in _moe_blocks(model)):
        return "some layers have no router beside their experts"
    return None


def _moe_blocks(model: Any) -> list[Any]:
    with_experts = moe_layers(model)
    return [_mlp_of(layer) for i, layer in enumerate(model.model.layers) if i in with_experts]


def _mlp_of(layer: Any) -> Any:
    """What follows attention in a layer: the block with experts, or an MLP."""
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


def _has_router(block: Any, routing: Routing) -> bool:
    return router_in(block, routing) is not None


@torch.inference_mode()
def device_steps(
    loaded: LoadedModel, kv_cache: KVCache, experts: Experts[BatchPlan], page_size: int, max_model_len: int
) -> DeviceSteps | None:
    """For models whose layers the kernels know; None, and a line in the log, for others."""
    reason = why_not(loaded.model, loaded.family, loaded.hf_config)
    if reason is not None:
        log.info("steps run module by module, in more launches, because %s", reason)
        return None
    return DeviceSteps(loaded, kv_cache, experts, page_size, max_model_len)
