"""The experts of one MoE layer for tokens grouped by expert, in one call.

    out[p] = down @ act(gate @ x[tokens[p]] + gate_bias, up @ x[tokens[p]] + up_bias) + down_bias

Float32 activations, rounded only where the weights ask for it (MLPWeights.rounds); weights in float32, bf16, float16,
quantised to eight or four bits (QuantizedRows), in ggml's blocks (BlockRows) or in 12-bit codes of bf16 (CodedRows),
read where they lie, at any address. Codes of bf16 give the bits that the bf16 weights give.
The bits of a row depend on its token and its weights: not on the other rows and segments of the call, the weights'
address or the number of threads. (One call per layer instead of one matrix product at a time: the fused MoE kernels of
vLLM and SGLang.)

Shape alphabet: T tokens, P (token, expert) pairs sorted by expert, H hidden, I intermediate.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch.nn import functional as F

from moe_serve_kernels import quantized
from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.coded import CodedRows
from moe_serve_kernels.cpu.expert_record import ExpertRecord
from moe_serve_kernels.cpu.library import native
from moe_serve_kernels.quantized import BlockRows, QuantizedRows

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Matrix = torch.Tensor | QuantizedRows | BlockRows | CodedRows
WEIGHT_KINDS = ("float32", "bfloat16", "float16", "int8", "uint8", "fp8", "int4", "fp4", "blocks")
Kind = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu", "limited_silu"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Activation:
    """How gate [.., I] and up [.., I] become one tensor: kind(gate) * up.

    clamped_swiglu is GPT-OSS's: (clamp(up) + 1) * gate * sigmoid(alpha * gate), gate clamped at `limit` above,
    up on both sides. limited_silu clamps alike and gives silu(gate) * up (DeepSeek-V4); the CPU's kernels have no such
    function (`has_function`).
    """

    kind: Kind
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, slots=True, eq=False)
class MLPWeights:
    """One expert: gate, up [I, H], down [H, I], all of one float type or one quantised kind that `are_readable` allows.
    Blocks may be of different types; of bf16 matrices some may be coded.

    Rows contiguous, any row stride. Biases [I], [I], [H] of one dtype, float32 or bf16, or None. Nothing is copied:
    the tensors must not move in memory while this object is in use.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    rounds: bool = field(default=False, kw_only=True)
    """Tokens are rounded to bf16 where they meet bf16 weights; sums are float32 as ever."""
    record: ExpertRecord = field(init=False, repr=False)

    def __post_init__(self) -> None:
        matrices = (self.gate, self.up, self.down)
        assert tuple(self.gate.shape) == tuple(self.up.shape) == tuple(self.down.shape)[::-1]
        assert are_readable(matrices)
        kind = product_kind(self.gate, self.rounds)
        record = ExpertRecord.of(kind, *matrices, self.gate_bias, self.up_bias, self.down_bias)
        object.__setattr__(self, "record", record)

    @property
    def address(self) -> int:
        """Of what the kernel reads."""
        return self.record.address


def weight_kind(matrix: Matrix) -> str:
    """One of WEIGHT_KINDS, or the name of a dtype that is none of them."""
    if isinstance(matrix, BlockRows):
        return "blocks"
    if isinstance(matrix, CodedRows):
        return "bfloat16"
    return matrix.kind if isinstance(matrix, QuantizedRows) else str(matrix.dtype).removeprefix("torch.")


def product_kind(matrix: Matrix, rounds: bool) -> str:
    """How the kernels multiply by it: a WeightKind in lower case."""
    kind = weight_kind(matrix)
    return "rounded_bfloat16" if rounds and kind == "bfloat16" else kind


def are_readable(matrices: Sequence[Matrix]) -> bool:
    """True when the kernel can read an expert's three matrices where they lie."""
    same_kind = len({weight_kind(m) for m in matrices}) == 1
    return same_kind and all(_is_readable(m) for m in matrices)


def _is_readable(matrix: Matrix) -> bool:
    if isinstance(matrix, BlockRows):
        return matrix.type in quantized.READABLE_BLOCKS and matrix.blocks.device.type == "cpu"
    if isinstance(matrix, CodedRows):
        return all(tensor.device.type == "cpu" and tensor.stride(-1) == 1 for tensor in matrix.tensors)
    if not isinstance(matrix, QuantizedRows):
        return matrix.dtype in WEIGHT_DTYPES and matrix.stride(1) == 1
    # Scales change between 64-byte runs of a row, for four-bit codes between 32-bit words.
    step = 64 if quantized.BITS[matrix.kind] == 8 else 8
    whole_groups = matrix.num_groups == 1 or matrix.group % step == 0
    rows_run = all(t.shape[1] == 1 or t.stride(1) == 1 for t in matrix.tensors)
    return matrix.codes.device.type == "cpu" and whole_groups and rows_run


def activation_arguments(activation: Activation) -> tuple[int, float, float]:
    """As every function that takes an activation wants it."""
    return native().value(f"ActivationKind.{activation.kind}"), activation.alpha, activation.limit


def has_function(activation: Activation) -> bool:
    """Whether the CPU's kernels know what joins gate and up."""
    return activation.kind != "limited_silu"


def is_available(device: torch.device, kind: str, compute_dtype: torch.dtype) -> bool:
    """True when `expert_mlp` can run on weights of that `weight_kind` and such activations here."""
    known = compute_dtype == torch.float32 and kind in WEIGHT_KINDS
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
    done = native().moe_serve_expert_mlp(
        x.data_ptr(),
        tokens.data_ptr(),
        out.data_ptr(),
        pairs.buffer_info()[0],
        len(weights),
        hidden,
        inner,
        *activation_arguments(activation),
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
            native().moe_serve_expert_mlp_finish(self._kept, None, 1)


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
    kept = native().moe_serve_expert_mlp_start(
        x.data_ptr(),
        tokens.data_ptr(),
        pairs.buffer_info()[0],
        hidden,
        inner,
        *activation_arguments(activation),
        num_threads,
    )
    if not kept:
        raise MemoryError("no memory for the scratch space of expert_mlp")
    return StartedMLP(weights, num_threads, kept)


def finish_expert_mlp(started: StartedMLP, out: torch.Tensor) -> None:
    """The down projection of a started expert, into its rows of `out` [P, H] float32."""
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    native().moe_serve_expert_mlp_finish(started.take(), out.data_ptr(), started.num_threads)


def as_tensor(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] in `dtype`."""
    return matrix.to(dtype) if isinstance(matrix, torch.Tensor) else matrix.dequantized(dtype)


def activate(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [.., I] -> [.., I] in plain torch."""
    if activation.kind in ("clamped_swiglu", "limited_silu"):
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.kind == "clamped_swiglu":
        return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))
    if activation.kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}
    return functions.get(activation.kind, F.silu)(gate) * up
