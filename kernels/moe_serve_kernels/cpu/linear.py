"""A linear layer on weights as checkpoints store them: float32 activations; weights in any format of `expert_mlp`.

    out[t] = weight @ x[t] + bias

The memory and the bytes per token are those of the stored weights. Products and sums are those of float32 weights with
their values. The kernel is the second half of `expert_mlp`.

Shape alphabet: T tokens, N rows of the weight (outputs), K columns (inputs), L layers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from moe_serve_kernels.cpu.expert_mlp import Matrix, are_readable, product_kind, weight_kind
from moe_serve_kernels.cpu.expert_record import ExpertRecord
from moe_serve_kernels.cpu.library import native


class LinearWeights:
    """weight [N, K], one that `are_readable` allows; bias [N] float32 or bf16, or None. Neither may move in memory."""

    def __init__(self, weight: Matrix, bias: torch.Tensor | None = None, rounds: bool = False) -> None:
        """`rounds`: tokens are rounded to bf16 where they meet bf16 weights."""
        assert are_readable([weight])
        self.weight, self.bias = weight, bias
        self.num_rows, self.num_columns = weight.shape
        self._record = ExpertRecord.of(product_kind(weight, rounds), None, None, weight, None, None, bias)
        self.address = self._record.address


def linear(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    """x [.., K] float32 -> [.., N]. Raises MemoryError."""
    assert x.dtype == torch.float32
    assert x.shape[-1] == weights.num_columns
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weights.num_rows)
    count = x.numel() // weights.num_columns
    if count and not native().moe_serve_linear(
        x.data_ptr(), weights.address, out.data_ptr(), count, torch.get_num_threads()
    ):
        raise MemoryError("no memory for the scratch space of linear")
    return out


class LinearTable:
    """Layers of one size and dtype, each for rows of its own: the heads of latent attention."""

    def __init__(self, layers: Sequence[LinearWeights]) -> None:
        self.layers = layers
        self._addresses = array("q", (layer.address for layer in layers))
        self.address = self._addresses.buffer_info()[0]


def linears(x: torch.Tensor, table: LinearTable) -> torch.Tensor:
    """x [L, T, K] float32 -> [L, T, N]; all layers in one call. Raises MemoryError."""
    layers = table.layers
    assert x.dtype == torch.float32
    assert x.shape[0] == len(layers)
    assert x.shape[2] == layers[0].num_columns
    x = x.contiguous()
    out = x.new_empty(*x.shape[:2], layers[0].num_rows)
    places = (x.data_ptr(), table.address, len(layers), out.data_ptr())
    if x.shape[1] and not native().moe_serve_linears(*places, x.shape[1], torch.get_num_threads()):
        raise MemoryError("no memory for the scratch space of linears")
    return out


class BlockTable:
    """A table in ggml's blocks of which single rows are wanted, such as that of embedded tokens. It may not move."""

    def __init__(self, rows: Matrix) -> None:
        assert weight_kind(rows) == "blocks"
        self._columns = rows.shape[1]
        self._weights = LinearWeights(rows)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [..] -> float32 [.., K]: ggml's values, to the bit."""
        assert ids.dtype == torch.int64
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self._columns)
        native().moe_serve_unpack_rows(self._weights.address, ids.data_ptr(), ids.numel(), out.data_ptr())
        return out
