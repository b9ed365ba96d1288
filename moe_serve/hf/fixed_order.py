"""Matrix products whose bits for a token do not depend on how many other tokens are in the step.

torch chooses another order of sums for another number of rows. Models with recurrent layers run through transformers'
modules; a prompt that goes on from a saved state has fewer rows there than one that is computed whole. The kernels of
moe_serve_kernels.cpu.linear add in one order. Knows modules; knows no batches and no states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_serve.hf.dense import StoredLinear
from moe_serve_kernels.cpu.linear import LinearWeights, linear


def install(model: nn.Module, widened: Collection[str] = ()) -> None:
    """Change a float32 model on a CPU in place. `widened`: names of linear layers that families read without calling
    them."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in widened:
                setattr(parent, name, StoredLinear.of(child))
    for module in model.modules():
        if not isinstance(module, nn.Linear) and _has_matrix(module):
            module.forward = _within(_Products(), module.forward)


def _has_matrix(module: nn.Module) -> bool:
    """A router: it multiplies by a matrix of its own."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


class _Products(TorchFunctionMode):
    """While it is entered, `F.linear` is our kernel."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: tuple[int, LinearWeights] | None = None
        """An address, and what was made of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        x, bias = args[0], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        product = linear(x.float(), self._weights_of(args[1]))
        return product if bias is None else product + bias

    def _weights_of(self, matrix: torch.Tensor) -> LinearWeights:
        """The matrix as the kernel reads it; it may have moved in memory."""
        address = matrix.data_ptr()
        if self._weights is None or self._weights[0] != address:
            self._weights = address, LinearWeights(matrix)
        return self._weights[1]


def _within(mode: TorchFunctionMode, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return call
