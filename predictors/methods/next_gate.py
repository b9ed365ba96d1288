"""A later layer's gate on this layer's hidden states: a forecast that needs no training.

The residual stream changes little from one layer to the next, so a router applied early mostly chooses what it will
choose (mixtral-offloading's speculative loading, arXiv 2312.17238). It says nothing before a token's first MoE layer.

Cost per token and forecast: H E multiplications, as much as the router itself.

Shape alphabet: T tokens, H hidden, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch

from predictors.predictor import HIDDEN, Floats, Ints, Probabilities, RouterShape, Training, inclusion
from predictors.streams import Rows

Router = tuple[torch.Tensor, torch.Tensor | None]
"""(weight [E, H], bias [E] or None) of one layer's gate."""


class NextGate:
    """Expected uses of a later layer's experts."""

    needs: ClassVar[frozenset[str]] = frozenset({HIDDEN})

    def __init__(self, routers: Sequence[Router], top_k: int = 1) -> None:
        """`routers` by dense layer index; they are not copied. `top_k` only counts for `probabilities`."""
        self._routers = routers
        self._top_k = top_k
        hidden_size = routers[0][0].shape[1] if routers else 0
        self._hidden = Rows((hidden_size,), np.float32, np.nan)

    @classmethod
    def fit(cls, training: Training) -> Self:
        if len(training.routers) != training.shape.num_layers:
            raise ValueError("next_gate needs every layer's router; a trace alone does not have them")
        return cls([_as_tensors(*router) for router in training.routers], training.shape.top_k)

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        layers = range(shape.num_layers)
        routers = [_as_tensors(arrays[f"weight.{i}"], arrays.get(f"bias.{i}")) for i in layers]
        return cls(routers, shape.top_k)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        weights = {f"weight.{i}": _as_array(weight) for i, (weight, _) in enumerate(self._routers)}
        return weights | {f"bias.{i}": _as_array(b) for i, (_, b) in enumerate(self._routers) if b is not None}

    def scores(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[E] for `layer`: probabilities summed over tokens; `hidden` [T, H] goes into an earlier layer's experts."""
        return self._gate(layer, hidden).sum(dim=0)

    def begin(self, streams: Ints) -> None:
        self._hidden.reset(streams)

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        self._hidden.data[streams] = np.nan

    def observe(
        self, layer: int, streams: Ints, ids: Ints, weights: Floats | None = None, hidden: Any | None = None
    ) -> None:
        assert hidden is not None, "next_gate needs hidden states"
        self._hidden.data[streams] = _as_array(torch.as_tensor(hidden))

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        hidden = torch.from_numpy(self._hidden.data[streams])
        gate = self._gate(layer, hidden).detach().cpu().numpy()
        unseen = np.isnan(gate).any(axis=1)
        gate[unseen] = 1
        return inclusion(gate, self._top_k)

    def _gate(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """[T, E]."""
        weight, bias = self._routers[layer]
        logits = torch.nn.functional.linear(hidden.to(weight.device, weight.dtype), weight, bias)
        return logits.float().softmax(dim=-1)


def _as_tensors(weight: Any, bias: Any | None) -> Router:
    return torch.as_tensor(weight), None if bias is None else torch.as_tensor(bias)


def _as_array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


METHOD = NextGate
