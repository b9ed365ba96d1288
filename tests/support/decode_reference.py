"""What `DecodeStep` computes, in plain torch and in the dtype of its inputs: the definition that tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_serve_kernels.cpu.decoder import DecodeInputs, DecoderBlock, DecoderShape
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from moe_serve_kernels.cpu.latent_heads import LatentHeads
from moe_serve_kernels.cpu.linear import LinearWeights
from tests.support.cpu_references import (
    expert_layer_reference,
    expert_mlp_reference,
    paged_decode_reference,
    route_reference,
)


def decode_step_reference(
    shape: DecoderShape,
    blocks: Sequence[DecoderBlock],
    final_norm: torch.Tensor,
    head: LinearWeights,
    inputs: DecodeInputs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, V], ids [L, T, K] and weights [L, T, K]; writes keys and values as the kernel does, but not x."""
    x, chosen = inputs.x.clone(), []
    for block in blocks:
        x = x + shape.residual_scale * _attention(shape, block, _norm(x, block.input_norm, shape), inputs)
        hidden = _norm(x, block.post_norm, shape)
        if block.shared is not None:
            x = x + shape.residual_scale * _shared(shape, block, hidden)
        if block.router is not None:
            ids, weights = route_reference(_linear(hidden, block.router), shape.routing, block.correction)
            chosen.append((ids, weights))
            assert block.experts is not None
            mixed = expert_layer_reference(hidden, ids, weights, block.experts.experts, shape.activation)
            x = x + shape.residual_scale * mixed
    logits = _linear(_norm(x, final_norm, shape), head)
    return logits, torch.stack([ids for ids, _ in chosen]), torch.stack([weights for _, weights in chosen])


def _norm(x: torch.Tensor, weight: torch.Tensor, shape: DecoderShape) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.norm_eps) * weight


def _linear(x: torch.Tensor, layer: LinearWeights) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return torch.nn.functional.linear(x, as_tensor(layer.weight, x.dtype), bias)


def _attention(shape: DecoderShape, block: DecoderBlock, x: torch.Tensor, inputs: DecodeInputs) -> torch.Tensor:
    query, keys, values = (_plain_heads if block.latents is None else _latent_heads)(shape, block, x, inputs)
    attended = paged_decode_reference(
        query,
        keys,
        values,
        inputs.page_table,
        inputs.lengths,
        page_size=shape.page_size,
        scale=shape.attention_scale,
        window=block.window,
        sinks=block.sinks,
    )
    return _linear(attended.flatten(1), block.o)


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query [T, Hq, D], keys [Hk, P * B, D] and values [Hk, P * B, Dv] of all tokens, the new ones included."""


def _plain_heads(shape: DecoderShape, block: DecoderBlock, x: torch.Tensor, inputs: DecodeInputs) -> Heads:
    assert block.k is not None
    assert block.v is not None
    assert block.values is not None
    query = _heads(shape, _linear(x, block.q), block.q_norm, inputs)
    key = _heads(shape, _linear(x, block.k), block.k_norm, inputs)
    value = _linear(x, block.v).view(len(x), shape.kv_heads, shape.value_dim)
    block.keys[:, inputs.kv_slots] = key.transpose(0, 1).to(block.keys.dtype)
    block.values[:, inputs.kv_slots] = value.transpose(0, 1).to(block.values.dtype)
    return query, block.keys.to(x.dtype), block.values.to(x.dtype)


def _latent_heads(shape: DecoderShape, block: DecoderBlock, x: torch.Tensor, inputs: DecodeInputs) -> Heads:
    latents, plain = block.latents, shape.head_dim - shape.rotary_dim
    assert latents is not None
    narrow = x if latents.q is None else _latent_norm(_linear(x, latents.q), latents.q_norm, shape)
    query = _linear(narrow, block.q).view(len(x), shape.heads, shape.head_dim)
    query = torch.cat([query[..., :plain], _rotate(shape, query[..., plain:], inputs)], dim=-1)
    row, turned = _linear(x, latents.kv).tensor_split([len(latents.kv_norm)], dim=-1)
    turned = _rotate(shape, turned[:, None], inputs)[:, 0]
    row = torch.cat([_latent_norm(row, latents.kv_norm, shape), turned], dim=-1)
    block.keys[0, inputs.kv_slots] = row.to(block.keys.dtype)
    return query, *_made_of_latents(block.keys[0].to(x.dtype), latents.heads)


def _made_of_latents(rows: torch.Tensor, heads: LatentHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [C, rank + R] -> keys [Hq, C, D], values [Hq, C, Dv]."""
    latents, turned = rows.tensor_split([heads.up.shape[2]], dim=-1)
    made = latents @ heads.up.to(rows.dtype).transpose(1, 2)
    plain, values = made.tensor_split([heads.plain], dim=-1)
    return torch.cat([plain, turned.expand(len(made), -1, -1)], dim=-1), values


def _latent_norm(x: torch.Tensor, weight: torch.Tensor | None, shape: DecoderShape) -> torch.Tensor:
    assert weight is not None
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.latent_norm_eps) * weight


def _heads(shape: DecoderShape, rows: torch.Tensor, norm: torch.Tensor | None, inputs: DecodeInputs) -> torch.Tensor:
    """[T, heads * D] -> [T, heads, D], normed and rotated."""
    if norm is not None and len(norm) != shape.head_dim:
        rows = _norm(rows, norm, shape)
    heads = rows.view(len(rows), -1, shape.head_dim)
    if norm is not None and len(norm) == shape.head_dim:
        heads = _norm(heads, norm, shape)
    turned, kept = heads.tensor_split([shape.rotary_dim], dim=-1)
    return torch.cat([_rotate(shape, turned, inputs), kept], dim=-1)


def _rotate(shape: DecoderShape, heads: torch.Tensor, inputs: DecodeInputs) -> torch.Tensor:
    """[T, heads, R] -> the same."""
    half = shape.rotary_dim // 2
    real, imaginary = (
        heads.tensor_split([half], dim=-1) if shape.rotary == "halves" else (heads[..., ::2], heads[..., 1::2])
    )
    cos, sin = inputs.cos[:, None], inputs.sin[:, None]
    parts = [real * cos - imaginary * sin, imaginary * cos + real * sin]
    return torch.stack(parts, dim=-1).flatten(-2) if shape.rotary == "neighbours" else torch.cat(parts, dim=-1)


def _shared(shape: DecoderShape, block: DecoderBlock, hidden: torch.Tensor) -> torch.Tensor:
    assert block.shared is not None
    out = torch.empty_like(hidden)
    tokens = torch.arange(len(hidden))
    expert_mlp_reference(hidden, tokens, [(0, len(hidden))], [block.shared], shape.activation, out)
    return out if block.shared_gate is None else out * _linear(hidden, block.shared_gate).sigmoid()


def in_float64(inputs: DecodeInputs) -> DecodeInputs:
    """The same step with float64 activations."""
    return replace(inputs, x=inputs.x.double(), cos=inputs.cos.double(), sin=inputs.sin.double())
