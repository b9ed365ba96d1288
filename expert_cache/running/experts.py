"""Experts: a model's experts behind one small interface, wherever their weights are.

One implementation for each way of keeping them: mapped.py, host_managed/experts.py, gpu_managed/experts.py (all
resident), gpu_managed/cache.py, and those over ranks in moe_serve/parallel/modes. Who calls does not ask which it is.
Knows no models, requests or routers.

Shape alphabet: T tokens, H hidden, K choices per token, L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.report import ExpertReport, ExpertTotals
from expert_cache.running.in_place import InPlaceExperts
from expert_cache.running.usage import RouteBuffer
from expert_cache.storage import ExpertReadError
from predictors.shape import MoELayer

Plan = TypeVar("Plan", contravariant=True)
"""What the caller calls a step. Observers may look into it; the experts do not."""


class ResizeError(Exception):
    """The memory for experts cannot be changed to what was asked for. `message` may be shown to a client."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class PaddingRows:
    """Rows of a captured step that only fill its batch up: they choose no expert and get zeros."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        """[T, 1] bool. Set while a step is captured that may have such rows."""

    def leave_out(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T, K], with -1 for the choices of these rows."""
        return ids if self.mask is None else ids.masked_fill(self.mask, -1)


Work = Callable[[], None]
"""What is done while experts are being read."""


def nothing() -> None:
    """The Work where there is none."""


class ExpertsControl(Protocol):
    """What an engine wants of a model's experts, besides running them."""

    def resize(self, mib: int) -> None:
        """Between steps: use this much memory for experts from now on. ResizeError."""
        ...

    def resident(self) -> NDArray[np.bool_] | None:
        """[L, E] experts in slots; None where no expert ever leaves, or where the host is not told which do."""
        ...

    def report(self) -> ExpertReport | None:
        """What the experts did since the start, and where they are now; None before anything is known. Any thread may
        call."""
        ...

    def totals(self) -> ExpertTotals:
        """The counts of `report` over all layers."""
        ...

    def close(self) -> None:
        """Stop all threads; more than once does no harm."""
        ...


class Experts(ExpertsControl, Protocol[Plan]):
    """What runs the experts of all layers."""

    routes: RouteBuffer
    """What the routers chose in the step, while it is on."""

    @property
    def padding(self) -> PaddingRows | None:
        """Where a step that can be captured says which rows are padding; None: steps ask the host and cannot be."""
        ...

    def in_place(self) -> InPlaceExperts | None:
        """All experts, for a kernel that runs whole steps by itself; None: `run` has to be called for every layer. The
        same object until the experts move."""
        ...

    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        hidden [T, H]; ids [T, K] int64; weights [T, K] (float32 or hidden's dtype) -> [T, H].
        Tokens whose expert cannot be read get zeros, and `take_failures` tells which. `meanwhile`: called once, while
        experts are being read if any have to be.
        """
        ...

    def begin_step(self, plan: Plan) -> None:
        """The next calls of `run` compute `plan`."""
        ...

    def between_steps(self) -> None:
        """Give memory back, or take it, and let layers change their shares of it, if it is time."""
        ...

    def take_failures(self) -> Mapping[int, ExpertReadError]:
        """Tokens of the steps since the last call whose results are worthless, by their row, and why."""
        ...
