"""Weights that a model keeps as they are stored, while transformers loads the model around them.

transformers knows floats of one type. So it is given a stand-in for each such weight: a tensor of the right shape that
takes the memory of one number, which is NaN. Afterwards the layer that holds a stand-in gets the weight itself. Knows
modules and matrices; knows no checkpoint format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moe_serve.hf.dense import StoredEmbedding, StoredLinear
from moe_serve_kernels.cpu import expert_mlp
from moe_serve_kernels.cpu.expert_mlp import Matrix, are_readable, as_tensor

MULTIPLIED_BY_OTHERS = ("kv_b_proj",)
"""Linear layers whose weights are cut into heads and multiplied there (latent attention): floats."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """A tensor that transformers is given, and what it stands for."""

    name: str
    number: torch.Tensor
    """[1, 1], whose address tells which stand-in a parameter is."""
    matrix: Matrix


class StandIns:
    """Those of one model."""

    def __init__(self, dtype: torch.dtype, refused: Collection[str] = ()) -> None:
        """`dtype` in which transformers loads; `refused`: names of weights that get none."""
        self._dtype, self._refused = dtype, refused
        self._by_address: dict[int, StandIn] = {}

    def offer(self, name: str, matrix: Matrix) -> torch.Tensor | None:
        """What to give transformers for [N, K] weights; None where they must be floats, or are of the right type."""
        is_wanted = isinstance(matrix, torch.Tensor) and matrix.dtype in (self._dtype, torch.float32)
        if name in self._refused or is_wanted or not are_readable([matrix]):
            return None
        number = torch.full((1, 1), torch.nan, dtype=self._dtype)
        self._by_address[number.data_ptr()] = StandIn(name, number, matrix)
        return number.expand(tuple(matrix.shape))

    @property
    def num_bytes(self) -> int:
        """Of what they stand for."""
        return sum(_bytes_of(each.matrix) for each in self._by_address.values())

    def replace(self, model: nn.Module, widened: Collection[str], router: tuple[int, int]) -> set[str]:
        """Give a loaded model's layers the weights. Returns names of weights that are in no layer: transformers changed
        their stand-ins, so the model must be loaded again with floats for these.

        `widened`: names of linear layers whose weights are to be floats; `router`: shape of those that are, too.
        """
        left = {each.name for each in self._by_address.values()}
        for parent, name, child, which in list(_parameters(model)):
            found = self._by_address.get(getattr(child, which).untyped_storage().data_ptr())
            if found is None:
                continue
            left.discard(found.name)
            floats = name in (*widened, *MULTIPLIED_BY_OTHERS) or tuple(found.matrix.shape) == router
            if type(child) is nn.Linear and not floats:
                setattr(parent, name, StoredLinear.of(child, found.matrix))
            elif type(child) is nn.Embedding:
                setattr(parent, name, StoredEmbedding.of(child, found.matrix))
            else:
                values = as_tensor(found.matrix, self._dtype)
                setattr(child, which, nn.Parameter(values, requires_grad=False))
        return left


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """(parent, child's name, child, name of a parameter of the child's own)."""
    for parent in model.modules():
        for name, child in parent.named_children():
            for which, _ in child.named_parameters(recurse=False):
                yield parent, name, child, which


def are_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True where linear layers can be computed from codes."""
    known = dtype in (torch.float32, torch.bfloat16)
    return known and expert_mlp.is_available(device, "bfloat16", torch.float32)


def _bytes_of(matrix: Matrix) -> int:
    if isinstance(matrix, torch.Tensor):
        return matrix.nbytes
    return sum(tensor.nbytes for tensor in matrix.tensors)
