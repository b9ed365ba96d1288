"""What `DecodeStep` computes, in plain torch and in the dtype of its inputs: the definition that tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_serve_kernels.cpu.decode_step import DecodeInputs, DecoderBlock, DecoderShape
from moe_serve_kernels.cpu.expert_layer import expert_layer_reference
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from moe_serve_kernels.cpu.linear import LinearWeights
from moe_serve_kernels.cpu.paged_attention import paged_decode_reference


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
        x = x + _attention(shape, block, _norm(x, block.input_norm, shape), inputs)
        hidden = _norm(x, block.post_norm, shape)
        ids, weights = _route(shape, _linear(hidden, block.router))
        chosen.append((ids, weights))
        assert block.experts is not None
        x = x + expert_layer_reference(hidden, ids, weights, block.experts.experts, shape.activation)
    logits = _linear(_norm(x, final_norm, shape), head)
    return logits, torch.stack([ids for ids, _ in chosen]), torch.stack([weights for _, weights in chosen])


def _norm(x: torch.Tensor, weight: torch.Tensor, shape: DecoderShape) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + shape.norm_eps) * weight


def _linear(x: torch.Tensor, layer: LinearWeights) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return torch.nn.functional.linear(x, as_tensor(layer.weight, x.dtype), bias)


def _attention(shape: DecoderShape, block: DecoderBlock, x: torch.Tensor, inputs: DecodeInputs) -> torch.Tensor:
    query = _heads(shape, _linear(x, block.q), block.q_norm, inputs)
    key = _heads(shape, _linear(x, block.k), block.k_norm, inputs)
    block.keys[:, inputs.kv_slots] = key.transpose(0, 1).to(block.keys.dtype)
    value = _linear(x, block.v).view(len(x), shape.kv_heads, shape.head_dim)
    block.values[:, inputs.kv_slots] = value.transpose(0, 1).to(block.values.dtype)
    attended = paged_decode_reference(
        query,
        block.keys.to(x.dtype),
        block.values.to(x.dtype),
        inputs.page_table,
        inputs.lengths,
        page_size=shape.page_size,
        scale=shape.attention_scale,
        window=block.window,
        sinks=block.sinks,
    )
    return _linear(attended.flatten(1), block.o)


def _heads(shape: DecoderShape, rows: torch.Tensor, norm: torch.Tensor | None, inputs: DecodeInputs) -> torch.Tensor:
    """[T, heads * D] -> [T, heads, D], normed and rotated."""
    if norm is not None and len(norm) != shape.head_dim:
        rows = _norm(rows, norm, shape)
    heads = rows.view(len(rows), -1, shape.head_dim)
    if norm is not None and len(norm) == shape.head_dim:
        heads = _norm(heads, norm, shape)
    real, imaginary = heads.chunk(2, dim=-1)
    cos, sin = inputs.cos[:, None], inputs.sin[:, None]
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def _route(shape: DecoderShape, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best, ids = scores.topk(shape.top_k)
    if shape.score == "softmax_of_chosen":
        return ids, best.softmax(-1) * shape.routing_scale
    weights = scores.softmax(-1).gather(-1, ids)
    if shape.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * shape.routing_scale


def in_float64(inputs: DecodeInputs) -> DecodeInputs:
    """The same step with float64 activations."""
    return replace(inputs, x=inputs.x.double(), cos=inputs.cos.double(), sin=inputs.sin.double())
