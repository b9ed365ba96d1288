"""A decoding step of a few sequences on the CPU as one call: attention, routing and experts of all layers.

Between the short layers of one token, waking threads and asking Python what comes next take longer than reading the
weights. Here one team of threads runs the whole step; where somebody else brings the experts, each layer's part
before them. Float32 activations on weights as they are stored. (llama.cpp's graphs on CPUs; CUDA graphs on GPUs.)

Shape alphabet: T tokens (one per sequence), H hidden, K choices, V vocabulary, L layers with a router.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import get_args

import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.decoder import DecodeInputs, DecoderBlock, DecoderShape, Rotary
from moe_serve_kernels.cpu.expert_mlp import KINDS
from moe_serve_kernels.cpu.linear import LinearWeights

MOST_TOKENS = 6
"""With more, weights are no longer all that takes time: STREAM_MAX_TOKENS in segments.h."""
MOST_CHOICES = 64
SCORES = ("softmax", "sigmoid", "softmax_of_chosen")
ROTARIES: tuple[str, ...] = get_args(Rotary)
"""In the order of ScoreKind and RotaryKind in decode_step.cpp."""


class _Block(ctypes.Structure):
    """struct Block in decode_step.cpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "q_latent", "kv_latent")],
        *[(name, ctypes.c_void_p) for name in ("into_latents", "from_latents")],
        *[(name, ctypes.c_void_p) for name in ("q_latent_norm", "kv_latent_norm")],
        *[(name, ctypes.c_void_p) for name in ("router", "correction", "shared", "shared_gate")],
        *[(name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm", "sinks")],
        ("window", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("keys", "values", "experts")],
        ("route", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    """struct Model."""

    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("final_norm", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "value_dim")],
        *[(name, ctypes.c_int64) for name in ("num_experts", "top_k")],
        *[(name, ctypes.c_int64) for name in ("kv_tokens", "page_size", "norms_all_heads")],
        *[(name, ctypes.c_int64) for name in ("rotary_dim", "rotary_kind")],
        *[(name, ctypes.c_int64) for name in ("score_kind", "renormalize")],
        *[(name, ctypes.c_int64) for name in ("num_groups", "top_groups", "best_of_group", "activation")],
        *[(name, ctypes.c_double) for name in ("activation_alpha", "activation_limit")],
        *[(name, ctypes.c_double) for name in ("norm_eps", "latent_norm_eps")],
        *[(name, ctypes.c_double) for name in ("attention_scale", "routing_scale", "residual_scale")],
        ("sizes", ctypes.c_int64 * 7),
    ]


class _Step(ctypes.Structure):
    """struct Step."""

    _fields_ = [
        ("num_tokens", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("cos", "sin", "kv_slots", "page_table", "lengths")],
        ("table_width", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("x", "normed", "ids", "weights", "logits")],
    ]


class DecodeStep:
    """One model's layers, ready to be run for at most MOST_TOKENS tokens."""

    def __init__(
        self, shape: DecoderShape, blocks: Sequence[DecoderBlock], final_norm: torch.Tensor, head: LinearWeights
    ) -> None:
        """`head`: [V, H]. The caller must have asked `is_available`."""
        assert shape.routing.top_k <= MOST_CHOICES
        self._shape = shape
        self._kept = (blocks, final_norm, head)
        self._routes = list(itertools.accumulate((b.router is not None for b in blocks), initial=0))
        self._blocks = (_Block * len(blocks))(*map(_block, blocks, self._routes))
        self._model = _model(shape, blocks, final_norm, head)
        self._model.blocks = ctypes.addressof(self._blocks)
        self._model_at = ctypes.addressof(self._model)
        self._num_threads = torch.get_num_threads()
        self._memory = self._new_memory()
        sizes = range(1, MOST_TOKENS + 1)
        self._outputs = [_Outputs(self._routes[-1], num_tokens, shape, head.num_rows) for num_tokens in sizes]

    def _new_memory(self) -> torch.Tensor:
        return torch.empty(_library().moe_serve_decode_memory(self._model_at, MOST_TOKENS, self._num_threads))

    def run(self, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole step: logits [T, V], chosen experts [L, T, K] int64 and their weights [L, T, K].

        All three are overwritten by the next step of as many tokens.
        """
        outputs, step = self._step(inputs)
        _library().moe_serve_decode_step(self._model_at, step, self._memory.data_ptr(), self._num_threads)
        return outputs.logits, outputs.ids, outputs.weights

    def until_experts(self, block: int, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer up to its experts: their input [T, H], and ids and weights [T, K].

        `shared`, then adding residual_scale times what the experts make of that to `inputs.x`, completes the layer.
        Without a router it is complete, and what is returned means nothing.
        """
        outputs, step = self._step(inputs)
        memory, threads = self._memory.data_ptr(), self._num_threads
        _library().moe_serve_decode_until_experts(self._model_at, step, block, memory, threads)
        route = min(self._routes[block], len(outputs.ids) - 1)
        return outputs.normed, outputs.ids[route], outputs.weights[route]

    def shared(self, block: int, inputs: DecodeInputs) -> None:
        """The shared expert's part of a layer that `until_experts` has begun, if it has one: while others are read."""
        if self._kept[0][block].shared is not None:
            _, step = self._step(inputs)
            memory, threads = self._memory.data_ptr(), self._num_threads
            _library().moe_serve_decode_shared(self._model_at, step, block, memory, threads)

    def head(self, inputs: DecodeInputs) -> torch.Tensor:
        """Logits [T, V] of `inputs.x`; overwritten by the next step of as many tokens."""
        outputs, step = self._step(inputs)
        _library().moe_serve_decode_head(self._model_at, step, self._memory.data_ptr(), self._num_threads)
        return outputs.logits

    def _step(self, inputs: DecodeInputs) -> tuple[_Outputs, int]:
        count, hidden = inputs.x.shape
        assert 0 < count <= MOST_TOKENS
        assert hidden == self._shape.hidden
        assert inputs.x.dtype == inputs.cos.dtype == inputs.sin.dtype == torch.float32
        tensors = (inputs.x, inputs.cos, inputs.sin, inputs.kv_slots, inputs.page_table, inputs.lengths)
        assert all(tensor.is_contiguous() for tensor in tensors)
        outputs = self._outputs[count - 1]
        step = outputs.step
        step.cos, step.sin = inputs.cos.data_ptr(), inputs.sin.data_ptr()
        step.kv_slots, step.lengths = inputs.kv_slots.data_ptr(), inputs.lengths.data_ptr()
        step.page_table, step.table_width = inputs.page_table.data_ptr(), inputs.page_table.shape[1]
        step.x = inputs.x.data_ptr()
        return outputs, ctypes.addressof(step)


class _Outputs:
    """Where a step of so many tokens leaves its results."""

    def __init__(self, num_routes: int, num_tokens: int, shape: DecoderShape, vocab_size: int) -> None:
        top_k = shape.routing.top_k
        self.normed = torch.empty(num_tokens, shape.hidden)
        self.ids = torch.empty(num_routes, num_tokens, top_k, dtype=torch.int64)
        self.weights = torch.empty(num_routes, num_tokens, top_k)
        self.logits = torch.empty(num_tokens, vocab_size)
        self.step = _Step(num_tokens=num_tokens)
        for name in ("normed", "ids", "weights", "logits"):
            setattr(self.step, name, getattr(self, name).data_ptr())


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when a `DecodeStep` for activations of `dtype` can run here."""
    return device.type == "cpu" and dtype == torch.float32 and library.load() is not None


TENSORS = ("input_norm", "post_norm", "q_norm", "k_norm", "sinks", "keys", "values", "correction")
WEIGHTS = ("q", "k", "v", "o", "router", "shared", "shared_gate", "experts")


def _block(block: DecoderBlock, route: int) -> _Block:
    tensors = {name: getattr(block, name) for name in TENSORS}
    weights = {name: getattr(block, name) for name in WEIGHTS}
    if (latents := block.latents) is not None:
        tensors |= {"q_latent_norm": latents.q_norm, "kv_latent_norm": latents.kv_norm}
        weights |= {"q_latent": latents.q, "kv_latent": latents.kv}
        weights |= {"into_latents": latents.heads.into, "from_latents": latents.heads.back}
    assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors.values())
    side_by_side = (block.q, block.k, block.v) if latents is None else (latents.q or block.q, latents.kv)
    assert len({w.weight.dtype for w in side_by_side if w is not None}) == 1
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    addresses = {name: stored.address for name, stored in weights.items() if stored is not None}
    return _Block(**pointers, **addresses, window=block.window or 0, route=route)


def _model(
    shape: DecoderShape, blocks: Sequence[DecoderBlock], final_norm: torch.Tensor, head: LinearWeights
) -> _Model:
    first, routing = blocks[0], shape.routing
    return _Model(
        num_blocks=len(blocks),
        final_norm=final_norm.data_ptr(),
        head=head.address,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        num_experts=max(block.router.num_rows for block in blocks if block.router is not None),
        top_k=routing.top_k,
        kv_tokens=first.keys.shape[1],
        page_size=shape.page_size,
        norms_all_heads=first.q_norm is not None and len(first.q_norm) != shape.head_dim,
        rotary_dim=shape.rotary_dim,
        rotary_kind=ROTARIES.index(shape.rotary),
        score_kind=SCORES.index(routing.score),
        renormalize=routing.renormalize,
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
        best_of_group=routing.best_of_group,
        activation=KINDS.index(shape.activation.kind),
        activation_alpha=shape.activation.alpha,
        activation_limit=shape.activation.limit,
        norm_eps=shape.norm_eps,
        latent_norm_eps=shape.latent_norm_eps,
        attention_scale=shape.attention_scale,
        routing_scale=routing.scaling,
        residual_scale=shape.residual_scale,
    )


@functools.cache
def _library() -> ctypes.CDLL:
    native = library.load()
    assert native is not None, "ask is_available first"
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    native.moe_serve_decode_memory.argtypes = [pointer, integer, number]
    native.moe_serve_decode_memory.restype = integer
    native.moe_serve_decode_step.argtypes = [pointer, pointer, pointer, number]
    native.moe_serve_decode_until_experts.argtypes = [pointer, pointer, integer, pointer, number]
    native.moe_serve_decode_shared.argtypes = [pointer, pointer, integer, pointer, number]
    native.moe_serve_decode_head.argtypes = [pointer, pointer, pointer, number]
    for returns_nothing in (
        native.moe_serve_decode_step,
        native.moe_serve_decode_until_experts,
        native.moe_serve_decode_shared,
        native.moe_serve_decode_head,
    ):
        returns_nothing.restype = None
    return native
