"""What a loaded model's layers are to the kernel that runs a whole decoding step (cpu/decode_step.py).

A family whose layers are plain (Family.plain_layers) has norms, attention and experts where Mixtral has them, and
nothing else: no shared experts, no scaled residuals, rotation of whole heads. What still differs is read from the
modules. Knows no family by name and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moe_serve.execution.kv_cache import KVCache
from moe_serve.hf.dense import StoredLinear
from moe_serve.hf.family import Family
from moe_serve_kernels.cpu.decode_step import MOST_CHOICES, SCORES, DecoderBlock, DecoderShape
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.cpu.linear import LinearWeights
from predictors.methods.next_gate import Router

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on a token's position alone, not on how long the context is."""


def why_not(family: Family, config: Any) -> str | None:
    """Why the kernel cannot run this family's layers, or None if it can."""
    if not family.plain_layers:
        return f"{config.model_type}'s layers are not plain"
    routing = family.routing(config)
    if routing is None or routing.score not in SCORES or routing.num_groups > 1 or routing.top_k > MOST_CHOICES:
        return "its router chooses in another way"
    if getattr(config, "clip_qkv", None) is not None:
        return "queries and keys are clipped"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPES or rope.get("partial_rotary_factor", 1) != 1:
        return "its rotation is not a fixed one of whole heads"
    return None


def shape_of(model: Any, family: Family, config: Any, activation: Activation, page_size: int) -> DecoderShape:
    """What all layers share; `why_not` must be None."""
    routing = family.routing(config)
    assert routing is not None
    assert routing.score != "sigmoid"
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    return DecoderShape(
        hidden=config.hidden_size,
        heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        top_k=routing.top_k,
        page_size=page_size,
        norm_eps=norm.variance_epsilon,
        attention_scale=attention.scaling,
        activation=activation,
        score=routing.score,
        renormalize=routing.renormalize,
        routing_scale=routing.scaling,
    )


def blocks_of(
    model: Any, config: Any, kv_cache: KVCache, routers: Sequence[Router], experts: Mapping[int, ExpertLayer]
) -> list[DecoderBlock]:
    """Each decoder layer; `routers` in their order; `experts`: by layer, those that the kernel is to run itself."""
    layers = enumerate(zip(model.model.layers, routers, strict=True))
    return [_block(layer, config, kv_cache, i, router, experts.get(i)) for i, (layer, router) in layers]


def _block(
    layer: Any, config: Any, kv_cache: KVCache, index: int, router: Router, experts: ExpertLayer | None
) -> DecoderBlock:
    attention = layer.self_attn
    kv = kv_cache.layers[index]
    return DecoderBlock(
        q=weights_of(attention.q_proj),
        k=weights_of(attention.k_proj),
        v=weights_of(attention.v_proj),
        o=weights_of(attention.o_proj),
        router=LinearWeights(*router),
        input_norm=layer.input_layernorm.weight,
        post_norm=layer.post_attention_layernorm.weight,
        keys=kv.keys,
        values=kv.values,
        q_norm=_weight(attention, "q_norm"),
        k_norm=_weight(attention, "k_norm"),
        sinks=getattr(attention, "sinks", None),
        window=attention.sliding_window if hasattr(attention, "sliding_window") else _window(config),
        experts=experts,
    )


def weights_of(layer: nn.Linear) -> LinearWeights:
    """A linear layer's parameters, where they lie."""
    return layer.stored if isinstance(layer, StoredLinear) else LinearWeights(layer.weight, layer.bias)


def _weight(module: Any, name: str) -> torch.Tensor | None:
    norm = getattr(module, name, None)
    return None if norm is None else norm.weight


def _window(config: Any) -> int | None:
    """Of families that pass the config's on."""
    window: int | None = getattr(config, "sliding_window", None)
    return window
