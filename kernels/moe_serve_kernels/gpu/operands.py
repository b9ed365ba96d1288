"""Reading tiles of weights of any format inside a kernel, and multiplying them with activations.

Shape alphabet: F outputs of a tile, N tokens of a tile, C inputs of one loop step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_of_choice(ids_ptr, slot_of_ptr, pair):
    """The slot of a pair's expert, int64; -1 where it is in none, and for padding (a negative id)."""
    expert = tl.load(ids_ptr + pair)
    return tl.load(slot_of_ptr + expert, mask=expert >= 0, other=-1).to(tl.int64)


@triton.jit
def scales_of_slot(slot, num_outputs, num_inputs, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """Where a slot's scales and zeros begin: one per output, in int4 one per output and group of inputs."""
    if FORMAT == "int4":
        return slot * (num_inputs // GROUP) * num_outputs
    else:
        return slot * num_outputs


@triton.jit
def to_float(w, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Stored weights -> `dtype`. An e4m3 byte is taken apart by hand: the same on every GPU and in the interpreter."""
    if FORMAT == "fp8":
        bits = w.to(tl.int32)
        shifted = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
        return ((shifted << 16).to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)  # 2 ** 120
    else:
        return w.to(dtype)


@triton.jit
def zeros(F: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):
    """What `multiply` adds to."""
    if SWAP:
        return tl.zeros([F, N], tl.float32)
    else:
        return tl.zeros([N, F], tl.float32)


@triton.jit
def multiply(w, x, acc, SWAP: tl.constexpr, UPCAST: tl.constexpr):
    """acc += w x^T: w [F, C], x [N, C], acc [F, N] where SWAP, else [N, F].

    SWAP makes the weights the operand with 64 rows, so that few tokens still use the large matrix instruction
    (vLLM, SGLang). UPCAST: the interpreter multiplies bf16 wrongly.
    """
    if UPCAST:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def load_rows(w_ptr, f, c, num_outputs, num_inputs, dtype: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr):
    """[F, C] of a matrix with its inputs innermost. EVEN: no loop step reaches beyond the inputs."""
    at = w_ptr + f[:, None] * num_inputs + c[None, :]
    mask = (f < num_outputs)[:, None]
    if not EVEN:
        mask = mask & (c < num_inputs)[None, :]
    return to_float(tl.load(at, mask=mask, other=0), dtype, FORMAT)


@triton.jit
def load_int4(w_ptr, scale_ptr, zero_ptr, f, group, stride, dtype: tl.constexpr, in_range, HALF_GROUP: tl.constexpr):
    """One group of a matrix with its outputs innermost, `stride` of them -> two tiles [C, F], C = HALF_GROUP."""
    row = group * HALF_GROUP + tl.arange(0, HALF_GROUP)
    mask = in_range[None, :]
    packed = tl.load(w_ptr + row[:, None] * stride + f[None, :], mask=mask, other=0)
    scale = tl.load(scale_ptr + group * stride + f, mask=in_range, other=0.0)[None, :]
    zero = tl.load(zero_ptr + group * stride + f, mask=in_range, other=0.0)[None, :]
    low = ((packed & 15).to(tl.float32) - zero) * scale
    high = ((packed >> 4).to(tl.float32) - zero) * scale
    return low.to(dtype), high.to(dtype)


@triton.jit
def load_inputs(x_rows, c, row_ok, num_inputs, EVEN: tl.constexpr):
    """[N, C] of the activations."""
    mask = row_ok[:, None]
    if not EVEN:
        mask = mask & (c < num_inputs)[None, :]
    return tl.load(x_rows + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_input_group(x_rows, group, row_ok, GROUP: tl.constexpr):
    """The halves [N, GROUP / 2] of one group of inputs."""
    half: tl.constexpr = GROUP // 2
    c = group * GROUP + tl.arange(0, half)
    low = tl.load(x_rows + c[None, :], mask=row_ok[:, None], other=0.0)
    return low, tl.load(x_rows + half + c[None, :], mask=row_ok[:, None], other=0.0)


@triton.jit
def multiply_group(
    acc,
    x_low,
    x_high,
    weights,
    f,
    f_ok,
    group,
    stride,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc plus one group of inputs times int4 weights (data, scale, zero)."""
    low, high = load_int4(weights[0], weights[1], weights[2], f, group, stride, dtype, f_ok, GROUP // 2)
    acc = multiply(tl.trans(low), x_low, acc, SWAP, UPCAST)
    return multiply(tl.trans(high), x_high, acc, SWAP, UPCAST)
