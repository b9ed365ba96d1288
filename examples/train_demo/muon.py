"""Muon: momentum SGD whose update is orthogonalised, for two-dimensional weights.

Every update matrix is replaced by (nearly) the closest semi-orthogonal matrix, found with a
Newton-Schulz iteration that needs only matrix products.  Stacked weights (experts, or the gate
and up halves of one projection) are treated as independent matrices, and matrices of the same
shape from different layers share one batched product.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix towards 1.

    ``matrices`` is [batch, rows, columns] with rows <= columns; the result has the same shape.
    The quintic leaves singular values in about 0.7 .. 1.2, which is exact enough for a step.
    """
    a, b, c = _QUINTIC
    x: Tensor = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


@dataclass
class _Slot:
    """Where one stack of update matrices came from, so the step can be written back."""

    param: Tensor
    parts: int
    transposed: bool
    update: Tensor


def _split(update: Tensor, parts: int) -> Tensor:
    """View [..., parts * rows, columns] as [stack, rows, columns]."""
    rows, columns = update.shape[-2] // parts, update.shape[-1]
    return update.reshape(-1, rows, columns)


class Muon(Optimizer):
    """Orthogonalised momentum for hidden matrices of shape [rows, cols] or [stack, rows, cols].

    A parameter group may set ``parts``: the number of independent matrices concatenated along
    the rows of each weight (2 for a fused gate/up projection).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "steps": steps,
            "parts": 1,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update; ``closure`` is accepted for the interface and not used."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[_Slot]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    slot = self._slot(param, group["momentum"], group["parts"])
                    by_shape[slot.update.shape[1:]].append(slot)
            for slots in by_shape.values():
                self._apply(slots, group)

    def _slot(self, param: Tensor, momentum: float, parts: int) -> _Slot:
        """Advance the (Nesterov) momentum of one weight and lay its update out flat."""
        assert param.grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        state["momentum"].lerp_(param.grad, 1 - momentum)
        update = _split(param.grad.lerp(state["momentum"], momentum), parts)
        transposed = update.shape[-2] > update.shape[-1]
        return _Slot(param, parts, transposed, update.mT if transposed else update)

    def _apply(self, slots: list[_Slot], group: dict[str, Any]) -> None:
        """Orthogonalise one batch of equal-shaped updates and step the weights they belong to."""
        result = orthogonalise(torch.cat([slot.update for slot in slots]), group["steps"])
        sizes = [slot.update.shape[0] for slot in slots]
        for slot, update in zip(slots, torch.split(result, sizes), strict=True):
            step = update.mT if slot.transposed else update
            scale = max(1.0, step.shape[-2] / step.shape[-1]) ** 0.5
            slot.param.mul_(1 - group["lr"] * group["weight_decay"])
            slot.param.add_(step.reshape(slot.param.shape), alpha=-group["lr"] * scale)
