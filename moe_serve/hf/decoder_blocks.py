"""What a loaded model's layers are to the kernel that runs a whole decoding step (cpu/decode_step.py).

A family whose layers are plain (Family.plain_layers) has norms, attention and MLPs where Mixtral, Qwen2-MoE (with its
shared expert) or DeepSeek (with its latents) have them, and does nothing else with them. What differs is read from the
modules and the config. Knows no family by name and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_serve.execution.kv_cache import KVCache
from moe_serve.hf.dense import StoredLinear
from moe_serve.hf.family import Family
from moe_serve.hf.routers import correction_of
from moe_serve_kernels.cpu.decoder import DecoderBlock, DecoderShape, Latents
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.cpu.expert_mlp import Activation, MLPWeights, are_readable, as_tensor
from moe_serve_kernels.cpu.latent_heads import LatentHeads
from moe_serve_kernels.cpu.linear import LinearWeights
from moe_serve_kernels.cpu.native_model import most_choices
from predictors.methods.next_gate import Router

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on a token's position alone, not on how long the context is."""
SHARED = ("shared_expert", "shared_experts")
"""What families call the MLP beside the experts."""


def why_not(family: Family, config: Any) -> str | None:
    """Why the CPU's kernel cannot run this family's layers, or None if it can."""
    reason, routing = why_unknown(family, config), family.routing(config)
    if reason is None and routing is not None and routing.top_k > most_choices():
        return "its router chooses in another way"
    return reason


def why_unknown(family: Family, config: Any) -> str | None:
    """What of this family's layers no kernel knows, on a CPU or a GPU; None if there is nothing."""
    if not family.plain_layers:
        return f"{config.model_type}'s layers are not plain"
    if family.routing(config) is None:
        return "its router chooses in another way"
    if getattr(config, "clip_qkv", None) is not None:
        return "queries and keys are clipped"
    if _rope(config).get("rope_type", "default") not in STATIC_ROPES:
        return "its rotation changes with the context"
    return None


def shape_of(model: Any, family: Family, config: Any, activation: Activation, page_size: int) -> DecoderShape:
    """What all layers share; `why_not` must be None."""
    routing = family.routing(config)
    assert routing is not None
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    latents = hasattr(attention, "latent_projections")
    head_dim = attention.qk_head_dim if latents else attention.head_dim
    turned = attention.qk_rope_head_dim if latents else int(head_dim * _rope(config).get("partial_rotary_factor", 1.0))
    return DecoderShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=1 if latents else config.num_key_value_heads,
        head_dim=head_dim,
        value_dim=attention.v_head_dim if latents else head_dim,
        page_size=page_size,
        norm_eps=norm.variance_epsilon,
        attention_scale=attention.scaling,
        activation=activation,
        routing=routing,
        rotary_dim=turned,
        rotary=family.rotary if getattr(config, "rope_interleave", True) else "halves",
        latent_norm_eps=attention.kv_a_layernorm.variance_epsilon if latents else 0.0,
        residual_scale=getattr(config, "residual_multiplier", 1.0),
    )


def blocks_of(
    model: Any, config: Any, kv_cache: KVCache, routers: Mapping[int, Router], experts: Mapping[int, ExpertLayer]
) -> list[DecoderBlock]:
    """Each decoder layer; `routers`: by layer, of those with experts; `experts`: those that the kernel runs itself."""
    layers = enumerate(model.model.layers)
    return [_block(layer, config, kv_cache, i, routers.get(i), experts.get(i)) for i, layer in layers]


def _block(
    layer: Any, config: Any, kv_cache: KVCache, index: int, router: Router | None, experts: ExpertLayer | None
) -> DecoderBlock:
    attention, kv = layer.self_attn, kv_cache.layers[index]
    mlp = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
    rounds = kv.keys.dtype == torch.bfloat16
    shared = mlp if router is None else _child(mlp, *SHARED)
    return DecoderBlock(
        q=_weights(attention, rounds, "q_b_proj", "q_proj"),
        k=_weights(attention, rounds, "k_proj"),
        v=_weights(attention, rounds, "v_proj"),
        latents=_latents(attention, rounds) if kv.shape.values_in_keys else None,
        o=weights_of(attention.o_proj, rounds),
        input_norm=layer.input_layernorm.weight.float(),
        post_norm=layer.post_attention_layernorm.weight.float(),
        keys=kv.keys,
        values=None if kv.shape.values_in_keys else kv.values,
        q_norm=_weight(attention, "q_norm"),
        k_norm=_weight(attention, "k_norm"),
        sinks=None if (sinks := getattr(attention, "sinks", None)) is None else sinks.float(),
        window=window_of(attention, config, index),
        router=None if router is None else LinearWeights(*router),
        correction=None if router is None else correction_of(mlp),
        experts=experts,
        shared=None if shared is None else _mlp(shared, rounds),
        shared_gate=_weights(mlp, rounds, "shared_expert_gate"),
    )


def weights_of(layer: nn.Linear, rounds: bool) -> LinearWeights:
    """A linear layer's parameters, where they lie; `rounds`: for tokens rounded to bf16."""
    if isinstance(layer, StoredLinear):
        return layer.weights(rounds) if rounds else layer.stored
    return LinearWeights(layer.weight, layer.bias, rounds)


def _weights(module: Any, rounds: bool, *names: str) -> Any:
    """LinearWeights of the first of these children that there is, or None."""
    layer = _child(module, *names)
    return None if layer is None else weights_of(layer, rounds)


def _latents(attention: Any, rounds: bool) -> Latents:
    projections = attention.latent_projections
    return Latents(
        kv=weights_of(attention.kv_a_proj_with_mqa, rounds),
        kv_norm=attention.kv_a_layernorm.weight.float(),
        heads=LatentHeads(projections.up, projections.plain, rounds) if rounds else projections.heads,
        q=_weights(attention, rounds, "q_a_proj"),
        q_norm=_weight(attention, "q_a_layernorm"),
    )


def _mlp(module: Any, rounds: bool) -> MLPWeights:
    """A dense MLP's parameters, where they lie; as float32 where they are not of one kind."""
    layers = [weights_of(layer, rounds) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    gate, up, down = (layer.weight for layer in layers)
    if not are_readable((gate, up, down)):
        gate, up, down = (as_tensor(matrix, torch.float32) for matrix in (gate, up, down))
    return MLPWeights(gate, up, down, *(layer.bias for layer in layers), rounds=rounds)


def _child(module: Any, *names: str) -> Any:
    """The first of these children that there is, or None."""
    return next((child for name in names if (child := getattr(module, name, None)) is not None), None)


def _weight(module: Any, name: str) -> torch.Tensor | None:
    norm = getattr(module, name, None)
    return None if norm is None else norm.weight.float()


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def window_of(attention: Any, config: Any, index: int) -> int | None:
    """Tokens that a layer's queries see; None: all. Families keep it on the layers that have one, or pass the config's
    on to all."""
    if (types := getattr(config, "layer_types", None)) is not None and types[index] != "sliding_attention":
        return None
    window: int | None = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return window
