"""A decoding step of a few sequences on the CPU as one call: attention, routing and experts of all layers.

Between the short layers of one token, waking threads and asking Python what comes next take longer than reading the
weights. Here one team of threads runs the whole step; where somebody else brings the experts, each layer's part
before them. Float32 activations on weights as they are stored. (llama.cpp's graphs on CPUs; CUDA graphs on GPUs.)

What a layer is: RMSNorm, rotary attention over paged keys and values with or without biases, norms of heads, sinks
and windows, RMSNorm, a softmax router, experts; both halves added to the residual stream. Knows no model by name.

Shape alphabet: T tokens (one per sequence), H hidden, Hq query and Hk key/value heads of D, E experts, K choices,
V vocabulary, P * B tokens that the pages hold.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_layer import ExpertLayer
from moe_serve_kernels.cpu.expert_mlp import KINDS, Activation
from moe_serve_kernels.cpu.linear import LinearWeights

MOST_TOKENS = 6
"""With more, weights are no longer all that takes time: STREAM_MAX_TOKENS in segments.h."""
MOST_CHOICES = 64
SCORES = ("softmax", "softmax_of_chosen")
"""In the order of ScoreKind in decode_step.cpp."""


@dataclass(frozen=True, slots=True)
class DecoderBlock:
    """One decoder layer; tensors float32 and contiguous, none may move in memory."""

    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    o: LinearWeights
    router: LinearWeights
    """[E, H]."""
    input_norm: torch.Tensor
    """[H], before attention."""
    post_norm: torch.Tensor
    """[H], before the router."""
    keys: torch.Tensor
    """[Hk, P * B, D]."""
    values: torch.Tensor
    """[Hk, P * B, D]."""
    q_norm: torch.Tensor | None = None
    """[D] for each head, or [Hq * D] over all of them."""
    k_norm: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    """[Hq] one more logit per head, without a value."""
    window: int | None = None
    """Tokens that a query sees, its own included."""
    experts: ExpertLayer | None = None
    """None: `DecodeStep.attention` is all that can be asked for."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What all layers share."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    top_k: int
    page_size: int
    norm_eps: float
    attention_scale: float
    activation: Activation
    score: Literal["softmax", "softmax_of_chosen"]
    renormalize: bool
    routing_scale: float


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """The sequences of a step, one token each."""

    x: torch.Tensor
    """[T, H] float32 embedded tokens; becomes what the layers make of them."""
    cos: torch.Tensor
    """[T, D / 2] float32 of each token's position."""
    sin: torch.Tensor
    kv_slots: torch.Tensor
    """[T] int64: page * B + offset of each token's own key and value."""
    page_table: torch.Tensor
    """[T, pages] int64."""
    lengths: torch.Tensor
    """[T] int64: tokens of the context, the new one included."""


class _Block(ctypes.Structure):
    """struct Block in decode_step.cpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "router", "input_norm", "post_norm")],
        *[(name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "sinks")],
        ("window", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("keys", "values", "experts")],
    ]


class _Model(ctypes.Structure):
    """struct Model."""

    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("final_norm", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "num_experts", "top_k")],
        *[(name, ctypes.c_int64) for name in ("kv_tokens", "page_size", "norms_all_heads", "score_kind")],
        *[(name, ctypes.c_int64) for name in ("renormalize", "activation")],
        *[(name, ctypes.c_double) for name in ("activation_alpha", "activation_limit")],
        *[(name, ctypes.c_double) for name in ("norm_eps", "attention_scale", "routing_scale")],
        *[(name, ctypes.c_int64) for name in ("intermediate", "scratch")],
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
        assert shape.top_k <= MOST_CHOICES
        self._shape = shape
        self._kept = (blocks, final_norm, head)
        self._blocks = (_Block * len(blocks))(*map(_block, blocks))
        self._model = _model(shape, blocks, final_norm, head)
        self._model.blocks = ctypes.addressof(self._blocks)
        self._model_at = ctypes.addressof(self._model)
        self._num_threads = torch.get_num_threads()
        self._memory = self._new_memory()
        self._outputs = [_Outputs(len(blocks), tokens + 1, shape, head.num_rows) for tokens in range(MOST_TOKENS)]

    def _new_memory(self) -> torch.Tensor:
        return torch.empty(_library().moe_serve_decode_memory(self._model_at, MOST_TOKENS, self._num_threads))

    def run(self, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole step: logits [T, V], chosen experts [L, T, K] int64 and their weights [L, T, K].

        All three are overwritten by the next step of as many tokens.
        """
        outputs, step = self._step(inputs)
        _library().moe_serve_decode_step(self._model_at, step, self._memory.data_ptr(), self._num_threads)
        return outputs.logits, outputs.ids, outputs.weights

    def attention(self, block: int, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer up to its experts: their input [T, H], and ids and weights [T, K].

        Adding what the experts make of that to `inputs.x` completes the layer.
        """
        outputs, step = self._step(inputs)
        memory, threads = self._memory.data_ptr(), self._num_threads
        _library().moe_serve_decode_attention(self._model_at, step, block, memory, threads)
        return outputs.normed, outputs.ids[block], outputs.weights[block]

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

    def __init__(self, num_blocks: int, num_tokens: int, shape: DecoderShape, vocab_size: int) -> None:
        self.normed = torch.empty(num_tokens, shape.hidden)
        self.ids = torch.empty(num_blocks, num_tokens, shape.top_k, dtype=torch.int64)
        self.weights = torch.empty(num_blocks, num_tokens, shape.top_k)
        self.logits = torch.empty(num_tokens, vocab_size)
        self.step = _Step(num_tokens=num_tokens)
        for name in ("normed", "ids", "weights", "logits"):
            setattr(self.step, name, getattr(self, name).data_ptr())


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when a `DecodeStep` for activations of `dtype` can run here."""
    return device.type == "cpu" and dtype == torch.float32 and library.load() is not None


def _block(block: DecoderBlock) -> _Block:
    tensors = (block.input_norm, block.post_norm, block.q_norm, block.k_norm, block.sinks, block.keys, block.values)
    assert all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)
    assert block.q.weight.dtype == block.k.weight.dtype == block.v.weight.dtype
    linears = {name: getattr(block, name).address for name in ("q", "k", "v", "o", "router")}
    named = ("input_norm", "post_norm", "q_norm", "k_norm", "sinks", "keys", "values")
    pointers = {name: None if t is None else t.data_ptr() for name, t in zip(named, tensors, strict=True)}
    experts = None if block.experts is None else block.experts.address
    return _Block(**linears, **pointers, window=block.window or 0, experts=experts)


def _model(
    shape: DecoderShape, blocks: Sequence[DecoderBlock], final_norm: torch.Tensor, head: LinearWeights
) -> _Model:
    first = blocks[0]
    return _Model(
        num_blocks=len(blocks),
        final_norm=final_norm.data_ptr(),
        head=head.address,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=first.router.num_rows,
        top_k=shape.top_k,
        kv_tokens=first.keys.shape[1],
        page_size=shape.page_size,
        norms_all_heads=first.q_norm is not None and len(first.q_norm) != shape.head_dim,
        score_kind=SCORES.index(shape.score),
        renormalize=shape.renormalize,
        activation=KINDS.index(shape.activation.kind),
        activation_alpha=shape.activation.alpha,
        activation_limit=shape.activation.limit,
        norm_eps=shape.norm_eps,
        attention_scale=shape.attention_scale,
        routing_scale=shape.routing_scale,
    )


@functools.cache
def _library() -> ctypes.CDLL:
    native = library.load()
    assert native is not None, "ask is_available first"
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    native.moe_serve_decode_memory.argtypes = [pointer, integer, number]
    native.moe_serve_decode_memory.restype = integer
    native.moe_serve_decode_step.argtypes = [pointer, pointer, pointer, number]
    native.moe_serve_decode_attention.argtypes = [pointer, pointer, integer, pointer, number]
    native.moe_serve_decode_head.argtypes = [pointer, pointer, pointer, number]
    for returns_nothing in (
        native.moe_serve_decode_step,
        native.moe_serve_decode_attention,
        native.moe_serve_decode_head,
    ):
        returns_nothing.restype = None
    return native
