"""The experts of one MoE layer for tokens grouped by expert, in one call.

    out[p] = down @ act(gate @ x[tokens[p]] + gate_bias, up @ x[tokens[p]] + up_bias) + down_bias

Float32 activations; float32 or bf16 weights read where they lie, at any address. The bits of a
segment depend on its tokens, its weights and how many tokens it has: not on the other segments of
the call, the weights' address or the number of threads. (One call per layer instead of one matrix
product at a time: the fused MoE kernels of vLLM and SGLang.)

Shape alphabet: T tokens, P (token, expert) pairs sorted by expert, H hidden, I intermediate.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F

from moe_serve_kernels.cpu import library

WEIGHT_DTYPES = (torch.float32, torch.bfloat16)
Kind = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]
KINDS: tuple[str, ...] = get_args(Kind)
"""In the order of ActivationKind in expert_mlp.cpp."""


@dataclass(frozen=True, slots=True)
class Activation:
    """How gate [.., I] and up [.., I] become one tensor: kind(gate) * up.

    clamped_swiglu is GPT-OSS's: (clamp(up) + 1) * gate * sigmoid(alpha * gate), gate clamped at `limit` above,
    up on both sides.
    """

    kind: Kind
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, slots=True, eq=False)
class MLPWeights:
    """One expert: gate, up [I, H], down [H, I], of one dtype, float32 or bf16; rows contiguous, any row stride.

    Biases [I], [I], [H] of one dtype, float32 or bf16, or None. Nothing is copied: the tensors must not move
    in memory while this object is in use.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    layout: array[int] = field(init=False, repr=False)
    """What the kernel reads: struct Expert in expert_mlp.cpp."""
    address: int = field(init=False, repr=False)
    """Of `layout`."""

    def __post_init__(self) -> None:
        matrices = (self.gate, self.up, self.down)
        assert self.gate.shape == self.up.shape == self.down.shape[::-1]
        assert all(m.stride(1) == 1 and m.dtype == self.gate.dtype in WEIGHT_DTYPES for m in matrices)
        layout = array("q", [value for matrix in matrices for value in matrix_layout(matrix)])
        for bias in (self.gate_bias, self.up_bias, self.down_bias):
            layout.extend(bias_layout(bias))
        layout.append(self.gate.dtype == torch.bfloat16)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "address", layout.buffer_info()[0])


def matrix_layout(matrix: torch.Tensor) -> tuple[int, int, int, int]:
    """struct Matrix in expert_mlp.cpp."""
    rows, columns = matrix.shape
    return matrix.data_ptr(), matrix.stride(0), rows, columns


def bias_layout(bias: torch.Tensor | None) -> tuple[int, int, int]:
    """struct Bias."""
    if bias is None:
        return 0, 0, 0
    assert bias.dtype in WEIGHT_DTYPES
    return bias.data_ptr(), bias.stride(0), int(bias.dtype == torch.bfloat16)


def is_available(device: torch.device, weight_dtype: torch.dtype, compute_dtype: torch.dtype) -> bool:
    """True when `expert_mlp` can run on such weights and activations here."""
    known = compute_dtype == torch.float32 and weight_dtype in WEIGHT_DTYPES
    return device.type == "cpu" and known and library.load() is not None


def expert_mlp(
    x: torch.Tensor,
    tokens: torch.Tensor,
    segments: Sequence[tuple[int, int]],
    weights: Sequence[MLPWeights],
    activation: Activation,
    out: torch.Tensor,
) -> None:
    """Fill the rows of `out` [P, H] that lie in `segments`; the others are left as they are.

    x [T, H] float32; tokens [P] int64, the row of x of each pair; segments[i] = (start, end) are the pairs
    of the expert weights[i]; all contiguous, all experts of one shape. Raises MemoryError.
    """
    if not weights:
        return
    assert x.dtype == out.dtype == torch.float32
    assert tokens.dtype == torch.int64
    assert x.is_contiguous() and tokens.is_contiguous() and out.is_contiguous()  # noqa: PT018
    inner, hidden = weights[0].gate.shape
    assert x.shape[1] == out.shape[1] == hidden
    pairs = array("q")
    for (start, end), expert in zip(segments, weights, strict=True):
        pairs.extend((expert.address, start, end))
    done = _function()(
        x.data_ptr(),
        tokens.data_ptr(),
        out.data_ptr(),
        pairs.buffer_info()[0],
        len(weights),
        hidden,
        inner,
        KINDS.index(activation.kind),
        activation.alpha,
        activation.limit,
        torch.get_num_threads(),
    )
    if not done:
        raise MemoryError("no memory for the scratch space of expert_mlp")


@dataclass(eq=False, slots=True)
class StartedMLP:
    """One expert whose first half has run: what the kernel keeps of it until `finish_expert_mlp`."""

    weights: MLPWeights
    num_threads: int
    _kept: int

    def take(self) -> int:
        """The kernel's address, once."""
        kept, self._kept = self._kept, 0
        assert kept, "finished twice"
        return kept

    def __del__(self) -> None:
        if self._kept:
            _finish()(self._kept, None, 1)


def start_expert_mlp(
    x: torch.Tensor, tokens: torch.Tensor, segment: tuple[int, int], weights: MLPWeights, activation: Activation
) -> StartedMLP:
    """Gate, up and activation of one expert's pairs; its `down` is not read yet. Raises MemoryError.

    Arguments as of `expert_mlp`. With `finish_expert_mlp` the same bits as that.
    """
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert segment[0] < segment[1]
    inner, hidden = weights.gate.shape
    pairs = array("q", (weights.address, *segment))
    num_threads = torch.get_num_threads()
    kept = _start()(
        x.data_ptr(),
        tokens.data_ptr(),
        pairs.buffer_info()[0],
        hidden,
        inner,
        KINDS.index(activation.kind),
        activation.alpha,
        activation.limit,
        num_threads,
    )
    if not kept:
        raise MemoryError("no memory for the scratch space of expert_mlp")
    return StartedMLP(weights, num_threads, kept)


def finish_expert_mlp(started: StartedMLP, out: torch.Tensor) -> None:
    """The down projection of a started expert, into its rows of `out` [P, H] float32."""
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    _finish()(started.take(), out.data_ptr(), started.num_threads)


POINTER, SIZE, FLAG, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


@functools.cache
def _function() -> Callable[..., bool]:
    argtypes = [POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, FLAG, REAL, REAL, FLAG]
    return _native("moe_serve_expert_mlp", argtypes, ctypes.c_bool)


@functools.cache
def _start() -> Callable[..., int | None]:
    argtypes = [POINTER, POINTER, POINTER, SIZE, SIZE, FLAG, REAL, REAL, FLAG]
    return _native("moe_serve_expert_mlp_start", argtypes, POINTER)


@functools.cache
def _finish() -> Callable[..., None]:
    return _native("moe_serve_expert_mlp_finish", [POINTER, POINTER, FLAG], None)


def _native(name: str, argtypes: list[Any], restype: Any) -> Callable[..., Any]:
    native = library.load()
    assert native is not None, "ask is_available first"
    function = native[name]
    function.argtypes, function.restype = argtypes, restype
    return function


def expert_mlp_reference(
    x: torch.Tensor,
    tokens: torch.Tensor,
    segments: Sequence[tuple[int, int]],
    weights: Sequence[MLPWeights],
    activation: Activation,
    out: torch.Tensor,
) -> None:
    """The same in plain torch, in the dtype of x."""
    for (start, end), expert in zip(segments, weights, strict=True):
        rows = x[tokens[start:end]]
        gate = _linear(rows, expert.gate, expert.gate_bias)
        up = _linear(rows, expert.up, expert.up_bias)
        out[start:end] = _linear(activate(activation, gate, up), expert.down, expert.down_bias)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def activate(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [.., I] -> [.., I] in plain torch."""
    if activation.kind == "clamped_swiglu":
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))
    if activation.kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    return functions[activation.kind](gate) * up
