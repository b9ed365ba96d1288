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
def to_float(w, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Stored weights -> `dtype`. An e4m3 byte is taken apart by hand: the same on every GPU and in the interpreter."""
    if FORMAT == "fp8" or FORMAT == "fp8_blocks":
        return e4m3_to_float(w).to(dtype)
    else:
        return w.to(dtype)


@triton.jit
def e4m3_to_float(byte):
    """uint8 -> float32, exact."""
    bits = byte.to(tl.int32)
    shifted = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
    return (shifted << 16).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def e2m1_to_float(nibble):
    """A 4-bit float in the low bits of an int32 -> float32, exact: its bits are the top ones of a tiny float32."""
    bits = ((nibble & 8) << 28) | ((nibble & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@triton.jit
def scale_to_float(scale, FORMAT: tl.constexpr):
    """A stored scale -> float32."""
    if FORMAT == "mxfp4":
        bits = scale.to(tl.int32)
        return tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)  # the least is 2 ** -127
    elif FORMAT == "nvfp4":
        return e4m3_to_float(scale)
    else:
        return scale


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
def load_rows(
    weights,
    f,
    first,
    num_outputs,
    num_inputs,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[F, C] of a matrix (data, scale) with its inputs innermost, from input `first` on.

    ROWS: outputs that share a scale of GROUP inputs; 0: the format has none such. Else GROUP is a multiple of BLOCK_C.
    EVEN: no loop step reaches beyond the inputs.
    """
    c = first + tl.arange(0, BLOCK_C)
    at = weights[0] + f[:, None] * num_inputs + c[None, :]
    f_ok = f < num_outputs
    mask = f_ok[:, None]
    if not EVEN:
        mask = mask & (c < num_inputs)[None, :]
    w = tl.load(at, mask=mask, other=0)
    if ROWS == 0:
        return to_float(w, dtype, FORMAT)
    else:
        of_group = weights[1] + (first // GROUP) * tl.cdiv(num_outputs, ROWS)
        scale = tl.load(of_group + f // ROWS, mask=f_ok, other=0.0)
        return (to_float(w, tl.float32, FORMAT) * scale[:, None]).to(dtype)


@triton.jit
def second_half(weights, num_outputs, num_inputs, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The up matrix behind the gate matrix (data, scale), of as many outputs."""
    if ROWS == 0:
        return weights[0] + num_outputs * num_inputs, weights[1]
    else:
        scales = tl.cdiv(num_inputs, GROUP) * tl.cdiv(num_outputs, ROWS)
        return weights[0] + num_outputs * num_inputs, weights[1] + scales


@triton.jit
def load_packed(weights, f, f_ok, step, stride, dtype: tl.constexpr, FORMAT: tl.constexpr, HALF: tl.constexpr):
    """One loop step of a packed matrix (data, scale, zero), `stride` outputs wide -> two tiles [HALF, F]."""
    row = step * HALF + tl.arange(0, HALF)
    packed = tl.load(weights[0] + row[:, None] * stride + f[None, :], mask=f_ok[None, :], other=0)
    if FORMAT == "int4":
        scale = tl.load(weights[1] + step * stride + f, mask=f_ok, other=0.0)[None, :]
        zero = tl.load(weights[2] + step * stride + f, mask=f_ok, other=0.0)[None, :]
        low = ((packed & 15).to(tl.float32) - zero) * scale
        high = ((packed >> 4).to(tl.float32) - zero) * scale
        return low.to(dtype), high.to(dtype)
    else:
        at = weights[1] + 2 * step * stride + f
        low_scale = scale_to_float(tl.load(at, mask=f_ok, other=0), FORMAT)[None, :]
        high_scale = scale_to_float(tl.load(at + stride, mask=f_ok, other=0), FORMAT)[None, :]
        bits = packed.to(tl.int32)
        low = e2m1_to_float(bits & 15) * low_scale
        high = e2m1_to_float(bits >> 4) * high_scale
        return low.to(dtype), high.to(dtype)


@triton.jit
def load_inputs(x_rows, c, row_ok, num_inputs, EVEN: tl.constexpr):
    """[N, C] of the activations."""
    mask = row_ok[:, None]
    if not EVEN:
        mask = mask & (c < num_inputs)[None, :]
    return tl.load(x_rows + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_input_halves(x_rows, step, row_ok, HALF: tl.constexpr):
    """The inputs of one loop step of a packed matrix, as its halves [N, HALF]."""
    c = step * 2 * HALF + tl.arange(0, HALF)
    low = tl.load(x_rows + c[None, :], mask=row_ok[:, None], other=0.0)
    return low, tl.load(x_rows + HALF + c[None, :], mask=row_ok[:, None], other=0.0)


@triton.jit
def multiply_packed(
    acc,
    x_low,
    x_high,
    weights,
    f,
    f_ok,
    step,
    stride,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc plus one loop step of inputs times packed weights."""
    low, high = load_packed(weights, f, f_ok, step, stride, dtype, FORMAT, HALF)
    acc = multiply(tl.trans(low), x_low, acc, SWAP, UPCAST)
    return multiply(tl.trans(high), x_high, acc, SWAP, UPCAST)
