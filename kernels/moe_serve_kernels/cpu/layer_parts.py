"""A decoder layer for any number of tokens, parts of prompts among them: one kernel after another.

What a token gets has the bits of `DecodeStep`, whatever else is in the batch: every kernel adds up a token's numbers in
an order that depends on nothing else. So a request's tokens do not depend on chunks, prefix hits or neighbours.

Shape alphabet: T tokens, H hidden, Hq query and Hk key/value heads of D (values of Dv), K choices, V vocabulary; with
latents rank of them, and R rotary values.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moe_serve_kernels.cpu.decoder import DecodeInputs, DecoderBlock, Latents
from moe_serve_kernels.cpu.expert_mlp import expert_mlp
from moe_serve_kernels.cpu.library import native
from moe_serve_kernels.cpu.linear import linear
from moe_serve_kernels.cpu.native_model import NativeModel


class LayerParts:
    """One model's layers; the methods are those of `DecodeStep`."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self._native = native()

    def until_experts(self, block: int, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer up to its experts: their input [T, H], and ids int64 and weights [T, K]; see `DecodeStep`."""
        layer = self._model.blocks[block]
        normed = self._norm(inputs.x, layer.input_norm)
        attended = (self._attend if layer.latents is None else self._attend_to_latents)(block, normed, inputs)
        self._add(inputs.x, linear(attended, layer.o))
        normed = self._norm(inputs.x, layer.post_norm)
        if layer.router is None:
            self._add_shared(layer, normed, inputs.x)
        return normed, *self._route(block, normed)

    def shared(self, block: int, inputs: DecodeInputs) -> None:
        """The shared expert's part of a layer that `until_experts` has begun, if it has one."""
        layer = self._model.blocks[block]
        if layer.shared is not None:
            self._add_shared(layer, self._norm(inputs.x, layer.post_norm), inputs.x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, H] -> logits [n, V]."""
        return linear(self._norm(x, self._model.final_norm), self._model.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        eps = self._model.shape.norm_eps if eps is None else eps
        places = (x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr())
        self._native.moe_serve_norm(*places, torch.get_num_threads())
        return out

    def _add(self, x: torch.Tensor, summand: torch.Tensor, weights: torch.Tensor | float = 1.0) -> None:
        """To the residual stream; `summand` is scaled in place."""
        x.add_(summand.mul_(weights * self._model.shape.residual_scale))

    def _attend(self, block: int, normed: torch.Tensor, inputs: DecodeInputs) -> torch.Tensor:
        """[T, H] -> [T, Hq * Dv]."""
        layer, shape = self._model.blocks[block], self._model.shape
        assert layer.k is not None
        assert layer.v is not None
        q, k, v = linear(normed, layer.q), linear(normed, layer.k), linear(normed, layer.v)
        attended = normed.new_empty(len(normed), shape.heads * shape.value_dim)
        tensors = (q.data_ptr(), k.data_ptr(), v.data_ptr(), attended.data_ptr())
        step = step_of(inputs)
        self._native.moe_serve_attend(
            self._model.address, ctypes.addressof(step), block, *tensors, torch.get_num_threads()
        )
        return attended

    def _attend_to_latents(self, block: int, normed: torch.Tensor, inputs: DecodeInputs) -> torch.Tensor:
        """[T, H] -> [T, Hq * Dv]."""
        layer, shape = self._model.blocks[block], self._model.shape
        latents, count, step = layer.latents, len(normed), step_of(inputs)
        assert latents is not None
        where = (self._model.address, ctypes.addressof(step), block)
        kv = linear(normed, latents.kv)
        self._native.moe_serve_write_latents(*where, kv.data_ptr(), torch.get_num_threads())
        q = linear(self._narrow(latents, normed), layer.q).view(count, shape.heads, shape.head_dim)
        carried = latents.heads.carry_over(q[..., : latents.heads.plain].transpose(0, 1))
        attended = torch.empty_like(carried)
        tensors = (q.data_ptr(), carried.data_ptr(), attended.data_ptr())
        self._native.moe_serve_attend_to_latents(*where, *tensors, torch.get_num_threads())
        return latents.heads.carry_back(attended).transpose(0, 1).reshape(count, -1)

    def _narrow(self, latents: Latents, normed: torch.Tensor) -> torch.Tensor:
        """What makes queries: the layer's input itself, or latents of it."""
        if latents.q is None:
            return normed
        assert latents.q_norm is not None
        return self._norm(linear(normed, latents.q), latents.q_norm, self._model.shape.latent_norm_eps)

    def _route(self, block: int, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H] -> ids [T, K] int64, weights [T, K]; of a layer without experts they mean nothing."""
        router, top_k = self._model.blocks[block].router, self._model.shape.routing.top_k
        ids = torch.empty(len(normed), top_k, dtype=torch.int64)
        weights = torch.empty(len(normed), top_k)
        if router is not None:
            scores = linear(normed, router)
            tensors = (scores.data_ptr(), ids.data_ptr(), weights.data_ptr())
            self._native.moe_serve_route(self._model.address, block, len(normed), *tensors, torch.get_num_threads())
        return ids, weights

    def _add_shared(self, layer: DecoderBlock, normed: torch.Tensor, x: torch.Tensor) -> None:
        assert layer.shared is not None
        out, count = torch.empty_like(normed), len(normed)
        expert_mlp(normed, torch.arange(count), [(0, count)], [layer.shared], self._model.shape.activation, out)
        if layer.shared_gate is None:
            return self._add(x, out)
        gate = linear(normed, layer.shared_gate)
        self._native.moe_serve_probabilities(count, gate.data_ptr(), torch.get_num_threads())
        return self._add(x, out, gate)


def step_of(inputs: DecodeInputs) -> Any:
    """struct Step, as far as attention reads it. The tensors of `inputs` must outlive it."""
    tensors = (inputs.x, inputs.cos, inputs.sin, inputs.kv_slots, inputs.page_table, inputs.lengths)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert inputs.x.dtype == inputs.cos.dtype == inputs.sin.dtype == torch.float32
    return native().new(
        "Step",
        num_tokens=len(inputs.x),
        cos=inputs.cos.data_ptr(),
        sin=inputs.sin.data_ptr(),
        kv_slots=inputs.kv_slots.data_ptr(),
        starts=None if inputs.starts is None else inputs.starts.data_ptr(),
        num_sequences=len(inputs.page_table),
        page_table=inputs.page_table.data_ptr(),
        table_width=inputs.page_table.shape[1],
        lengths=inputs.lengths.data_ptr(),
        **dict.fromkeys(("x", "normed", "ids", "weights", "logits")),
    )
