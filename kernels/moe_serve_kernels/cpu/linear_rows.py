"""x @ weight^T for a few tokens: float32 activations, bf16 weights read in place.

Shape alphabet: t tokens, N rows of the weight (outputs), K columns (inputs).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from moe_serve_kernels.cpu import library

POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64
ARGTYPES: list[Any] = [*[POINTER] * 3, *[INT64] * 5, ctypes.c_int32]


def is_available(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """True when `linear_rows` can multiply activations of `dtype` by this weight here."""
    readable = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.stride(1) == 1
    return readable and dtype == torch.float32 and library.load() is not None


def linear_rows(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [t, K] float32, weight [N, K] bf16 with contiguous rows -> [t, N] float32.

    `out` [t, N] float32 may be a column slice of a wider tensor.
    """
    native = library.load()
    assert native is not None, "ask is_available first"
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    assert x.dtype == out.dtype == torch.float32
    assert weight.dtype == torch.bfloat16
    assert x.shape[1] == weight.shape[1]
    function = native.moe_serve_linear_rows_bf16
    function.argtypes, function.restype = ARGTYPES, None
    function(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        weight.shape[0],
        weight.shape[1],
        weight.stride(0),
        out.stride(0),
        torch.get_num_threads(),
    )
    return out


def linear_rows_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    return x @ weight.to(x.dtype).t()
