"""The dense part of a model in memory as it is stored, in bf16 or in codes, mapped or copied.

Widening a bf16 checkpoint to float32 would double its memory and the bytes that every token reads; four bits would
become eight times as much. Here the weights of linear layers and embeddings stay as they are, only their results are
floats. What is small (norms, routers, biases of routers) is widened. Products and sums are those of the widened model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from moe_serve.hf.plain_torch import plain_torch
from moe_serve_kernels.cpu import expert_mlp
from moe_serve_kernels.cpu.coded import CodedRows
from moe_serve_kernels.cpu.expert_mlp import Matrix, as_tensor
from moe_serve_kernels.cpu.linear import BlockTable, LinearWeights, linear
from moe_serve_kernels.quantized import BlockRows


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True where a bf16 checkpoint computed in `dtype` can stay bf16 in memory."""
    return dtype == torch.float32 and expert_mlp.is_available(device, "bfloat16", dtype)


class StoredLinear(nn.Linear):
    """x [.., K] -> [.., N] of x's dtype, computed in float32 on a weight [N, K] as it is stored, bias [N]."""

    @staticmethod
    def of(layer: nn.Linear, matrix: Matrix | None = None, rounds: bool = False) -> StoredLinear:
        """Shares the layer's parameters, or has `matrix` in the place of its weight. `moved` must be called when these
        move in memory. `rounds`: inputs are bf16, or rounded to it."""
        stored = StoredLinear.__new__(StoredLinear)
        nn.Module.__init__(stored)
        stored.in_features, stored.out_features = layer.in_features, layer.out_features
        stored.weight = layer.weight if matrix is None else _no_values(layer.weight)
        stored.bias = layer.bias
        stored.matrix, stored.rounds = matrix, rounds
        stored.moved()
        return stored

    stored: LinearWeights
    """The parameters as the kernels read them."""
    matrix: Matrix | None
    """In the place of `weight`, which then has no values."""
    rounds: bool
    """As of LinearWeights."""

    def moved(self) -> None:
        """To be called when the parameters have moved in memory."""
        self.stored = self.weights(self.rounds)

    def weights(self, rounds: bool = False) -> LinearWeights:
        """`rounds`: as of LinearWeights."""
        return LinearWeights(self.weight if self.matrix is None else self.matrix, self.bias, rounds)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with plain_torch():
            return linear(input.float(), self.stored).to(input.dtype)


class StoredEmbedding(nn.Embedding):
    """ids -> float rows of a table as it is stored."""

    matrix: Matrix | None = None
    """In the place of `weight`, which then has no values."""
    dtype: torch.dtype = torch.float32
    """Of the rows."""

    @staticmethod
    def of(table: nn.Embedding, matrix: Matrix | None = None) -> StoredEmbedding:
        """Shares the table's rows, or has `matrix` in their place."""
        stored = StoredEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight)
        stored.weight = table.weight  # the same parameter: it may be tied to the output layer's
        if matrix is not None:
            stored.dtype, stored.weight, stored.matrix = table.weight.dtype, _no_values(table.weight), matrix
            stored.moved()
        return stored

    def moved(self) -> None:
        """To be called when the parameters have moved in memory."""
        self._blocks = BlockTable(self.matrix) if isinstance(self.matrix, BlockRows) else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.matrix is None:
            return super().forward(input).float()
        if self._blocks is not None:
            return self._blocks.rows(input).to(self.dtype)
        return as_tensor(rows_of(self.matrix, input.flatten()), self.dtype).view(*input.shape, -1)


def rows_of(matrix: Matrix, which: torch.Tensor) -> Matrix:
    """[N, K] -> [len(which), K]."""
    if isinstance(matrix, torch.Tensor):
        return matrix[which]
    assert not isinstance(matrix, CodedRows)
    return matrix.rows(which)


def _no_values(parameter: torch.Tensor) -> nn.Parameter:
    """Of the same type and without memory: what reads its values fails."""
    return nn.Parameter(parameter.new_empty(0), requires_grad=False)


def compute_in_float32(model: nn.Module, widened: Collection[str] = ()) -> None:
    """Change a bf16 model in place, so that it takes and gives float32. `widened`: names of linear layers whose weights
    are not left in bf16."""
    kept: set[int] = set()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in widened:
                setattr(parent, name, StoredLinear.of(child))
            elif type(child) is nn.Embedding:
                setattr(parent, name, StoredEmbedding.of(child))
            else:
                continue
            kept |= {id(parameter) for parameter in child.parameters(recurse=False)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in kept and tensor.is_floating_point():
            tensor.data = tensor.data.float()


def use_codes(model: nn.Module, codes: Mapping[str, CodedRows]) -> int:
    """Have layers that `compute_in_float32` made compute from 12-bit codes of their weights, by parameters' names. All
    bits stay the same. Returns how many layers do."""
    count = 0
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            found = codes.get(f"{prefix}.{name}.weight" if prefix else f"{name}.weight")
            if found is None or not isinstance(child, StoredLinear) or child.weight.shape != found.shape:
                continue
            if child.weight.dtype == torch.bfloat16:
                setattr(parent, name, StoredLinear.of(child, found))
                count += 1
    return count


def copy_from_files(model: nn.Module) -> None:
    """Give every weight memory of its own. Slots for experts take all the memory there may be, and mapped pages
    are what the kernel drops first then, to read them again with every token."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    layers = [layer for layer in model.modules() if isinstance(layer, StoredLinear | StoredEmbedding)]
    matrices = {id(layer.matrix): layer.matrix for layer in layers if layer.matrix is not None}
    copies = {key: _copy_of(matrix) for key, matrix in matrices.items()}
    for layer in layers:
        if layer.matrix is not None:  # may be that of another layer too
            layer.matrix = copies[id(layer.matrix)]
        layer.moved()


def _copy_of(matrix: Any) -> Any:
    """A Matrix in memory of its own."""
    if isinstance(matrix, torch.Tensor):
        return matrix.clone()
    values = ((field.name, getattr(matrix, field.name)) for field in dataclasses.fields(matrix))
    return dataclasses.replace(matrix, **{name: v.clone() for name, v in values if isinstance(v, torch.Tensor)})
