"""The dense part of a model in memory: bf16 as it is stored, mapped or copied.

Widening a bf16 checkpoint to float32 would double its memory and the bytes that every token reads. Here the
weights of linear layers and embeddings stay as they are, only their results are float32; what is small (norms,
routers, biases of routers) is widened. Products and sums are those of the widened model.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from moe_serve_kernels.cpu import expert_mlp
from moe_serve_kernels.cpu.linear import LinearWeights, linear


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True where a bf16 checkpoint computed in `dtype` can stay bf16 in memory."""
    return dtype == torch.float32 and expert_mlp.is_available(device, "bfloat16", dtype)


class StoredLinear(nn.Linear):
    """x [.., K] float32 -> [.., N] float32, weight [N, K] and bias [N] in bf16."""

    @staticmethod
    def of(layer: nn.Linear) -> StoredLinear:
        """Shares the layer's parameters; `moved` must be called when these move in memory."""
        stored = StoredLinear.__new__(StoredLinear)
        nn.Module.__init__(stored)
        stored.in_features, stored.out_features = layer.in_features, layer.out_features
        stored.weight, stored.bias = layer.weight, layer.bias
        stored.moved()
        return stored

    stored: LinearWeights
    """The parameters as the kernels read them."""

    def moved(self) -> None:
        """To be called when the parameters have moved in memory."""
        self.stored = LinearWeights(self.weight, self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.stored)


class StoredEmbedding(nn.Embedding):
    """ids -> float32 rows of a bf16 table."""

    @staticmethod
    def of(table: nn.Embedding) -> StoredEmbedding:
        """Shares the table's rows."""
        stored = StoredEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight)
        stored.weight = table.weight  # the same parameter: it may be tied to the output layer's
        return stored

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


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


def copy_from_files(model: nn.Module) -> None:
    """Give every weight memory of its own. Slots for experts take all the memory there may be, and mapped pages
    are what the kernel drops first then, to read them again with every token."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    for layer in model.modules():
        if isinstance(layer, StoredLinear):
            layer.moved()
