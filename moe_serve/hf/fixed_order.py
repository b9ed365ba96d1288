"""Modules' arithmetic in an order that depends on nothing but the token: alone or among others, the same bits.

torch chooses another order of sums for another number of rows, and computes the last elements of an array with another
formula than those before them. Both make a token's last bits depend on the step's other tokens. So while a model's
modules run, matrix products go to the kernels of moe_serve_kernels.cpu.linear, and some functions of single numbers to
formulas that are the same for every element (docs/log/engine.md has what was measured). Sums over the last dimension,
softmax and norms are left to torch: it computes each row by itself.

Knows functions of torch; knows no family, no batches and no states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moe_serve.hf.dense import StoredLinear
from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.linear import LinearWeights, linear

DTYPES = (torch.float32, torch.bfloat16)


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True where a model that computes in `dtype` can have its products in one order."""
    return device.type == "cpu" and dtype in DTYPES and library.load() is not None


def install(model: nn.Module, widened: Collection[str] = ()) -> None:
    """Change a model on a CPU in place. `widened`: names of linear layers that families read without calling them."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in widened:
                setattr(parent, name, StoredLinear.of(child, rounds=child.weight.dtype == torch.bfloat16))
    forward, order = model.forward, FixedOrder()

    def in_order(*args: Any, **kwargs: Any) -> Any:
        with order:
            return forward(*args, **kwargs)

    model.forward = in_order


class FixedOrder(TorchFunctionMode):
    """While it is entered, these functions are ours."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, tuple[int, LinearWeights]] = {}
        """By a parameter's id: where it lay, and what was made of it, which keeps the parameter alive."""
        self._functions: dict[Any, Callable[..., Any]] = {F.linear: self._linear, **FUNCTIONS}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = self._functions.get(func, func)
        return ours(*args, **kwargs) if kwargs else ours(*args)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.dtype not in DTYPES or weight.dim() != 2:
            return F.linear(x, weight, bias)
        product = linear(x.float(), self._weights_of(weight)).to(x.dtype)
        return product if bias is None else product + bias

    def _weights_of(self, matrix: torch.Tensor) -> LinearWeights:
        """As the kernel reads them. A parameter may move in memory; other matrices live as long as one call."""
        if not isinstance(matrix, nn.Parameter):
            return _weights(matrix)
        known, address = self._weights.get(id(matrix)), matrix.data_ptr()
        if known is None or known[0] != address:
            known = self._weights[id(matrix)] = address, _weights(matrix)
        return known[1]


def _weights(matrix: torch.Tensor) -> LinearWeights:
    """[N, K], or a copy of it where rows are not contiguous."""
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return LinearWeights(matrix, rounds=matrix.dtype == torch.bfloat16)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[.., M, K], [.., K, N] -> [.., M, N]."""
    if min(a.dim(), b.dim()) < 2 or a.dtype not in DTYPES:
        return torch.matmul(a, b)
    if a.shape[-1] == 1:
        return a * b
    if b.shape[-1] == 1:
        return (a.float() * b.float().mT).sum(-1, keepdim=True).to(a.dtype)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rows = b.mT.contiguous()
    if all(size == 1 for size in rows.shape[:-2]):
        return linear(a.float(), _weights(rows.flatten(0, -2))).to(a.dtype).expand(*batch, -1, -1)
    lefts = a.expand(*batch, -1, -1).reshape(-1, *a.shape[-2:])
    rights = rows.expand(*batch, -1, -1).reshape(-1, *rows.shape[-2:])
    products = [linear(left.float(), _weights(right)) for left, right in zip(lefts, rights, strict=True)]
    return torch.stack(products).to(a.dtype).view(*batch, a.shape[-2], b.shape[-1])


def _conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Depthwise: x [N, C, W + T - 1], weight [C, 1, W] -> [N, C, T]. Others are torch's."""
    is_known = groups == len(weight) and weight.shape[1] == 1 and {stride, padding, dilation} <= {0, 1}
    if not is_known or stride != 1 or padding != 0 or dilation != 1:
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    products = x.unfold(-1, weight.shape[-1], 1).float() * weight.float()
    out = products.sum(-1) if bias is None else products.sum(-1) + bias.float()[:, None]
    return out.to(x.dtype)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return (1 / (1 + torch.exp(-x.float()))).to(x.dtype)


def _silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    wide = x.float()
    return (wide / (1 + torch.exp(-wide))).to(x.dtype)


def _softplus(x: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    scaled = x.float() * beta
    return torch.where(scaled > threshold, scaled, torch.log1p(torch.exp(scaled))).div(beta).to(x.dtype)


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    wide = x.float()
    if approximate == "tanh":
        turned = torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide))
    else:
        turned = torch.erf(wide * math.sqrt(0.5))
    return (0.5 * wide * (1 + turned)).to(x.dtype)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid), _sigmoid),
    F.conv1d: _conv1d,
    F.gelu: _gelu,
    F.silu: _silu,
    F.softplus: _softplus,
}
"""In the place of torch's; `_matmul` and `_conv1d` give back what they do not know."""
