"""A linear layer on weights as checkpoints store them: float32 activations, float32 or bf16 weights.

    out[t] = weight @ x[t] + bias

Half the memory and half the bytes per token of a layer widened to float32, with the products and sums that
the widened one would have. The kernel is the second half of `expert_mlp`.

Shape alphabet: T tokens, N rows of the weight (outputs), K columns (inputs).
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable

import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_mlp import WEIGHT_DTYPES, bias_layout, matrix_layout

POINTER = ctypes.c_void_p


class LinearWeights:
    """weight [N, K] with contiguous rows, bias [N] or None, each float32 or bf16; neither may move in memory."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        assert weight.stride(1) == 1
        assert weight.dtype in WEIGHT_DTYPES
        self.weight, self.bias = weight, bias
        self.num_rows, self.num_columns = weight.shape
        no_matrix = [0] * len(matrix_layout(weight))
        biases = [*bias_layout(None), *bias_layout(None), *bias_layout(bias)]
        matrices = [*no_matrix, *no_matrix, *matrix_layout(weight)]
        self._layout = array("q", [*matrices, *biases, weight.dtype == torch.bfloat16])
        self.address = self._layout.buffer_info()[0]


def linear(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """x [.., K] float32 -> [.., N]. Raises MemoryError."""
    assert x.dtype == torch.float32
    assert x.shape[-1] == weights.num_columns
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weights.num_rows)
    count = x.numel() // weights.num_columns
    if count and not _function()(x.data_ptr(), weights.address, out.data_ptr(), count, torch.get_num_threads()):
        raise MemoryError("no memory for the scratch space of linear")
    return out


@functools.cache
def _function() -> Callable[..., bool]:
    native = library.load()
    assert native is not None, "ask expert_mlp.is_available first"
    function = native.moe_serve_linear
    function.argtypes = [POINTER, POINTER, POINTER, ctypes.c_int64, ctypes.c_int32]
    function.restype = ctypes.c_bool
    typed: Callable[..., bool] = function
    return typed
