"""Recurrent layers: transformers' own mixers, called once per sequence's state instead of once per batch.

A mixer (gated delta net, Mamba, short convolution) continues a state that transformers' cache would hold. Here the
flattened tokens of a step belong to many sequences, and the states lie in a StateCache. A family says which class mixes
and under which argument it takes the cache; the arithmetic stays transformers'.

Knows what transformers asks of a cache; knows no batches and no family by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from moe_serve.execution.state_cache import Mix, StateKey, States, StateShape
from moe_serve.hf.plain_torch import plain_torch


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Which modules of a family keep a state per sequence."""

    mixer: str
    """Name of their class in transformers."""
    cache_argument: str = "cache_params"
    """The parameter of `forward` that takes the cache."""
    continues_runs: bool = True
    """Given a state and several tokens, it goes on from the state. Otherwise later chunks of a prompt are computed a
    token at a time."""
    returns_weights: bool = False
    """Its forward returns (mixed, attention weights), not mixed alone."""


class RunsMixers(Protocol):
    """What gives a mixer its sequences' states, one after the other."""

    def run(self, layer: int, mix: Mix, hidden: torch.Tensor) -> torch.Tensor: ...


class Mixer:
    """Stands in the place of one module's `forward`."""

    def __init__(self, module: Any, recurrence: Recurrence) -> None:
        self.layer = int(module.layer_idx)
        self.states: RunsMixers | None = None
        self._forward = module.forward
        self._recurrence = recurrence
        self._unread = _without_default(self._forward) - {recurrence.cache_argument}

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        """[1, T, H] -> [1, T, H]. Masks and caches that the model hands over are for padded batches: left out."""
        assert self.states is not None, "states are connected before the first step"
        mixed = self.states.run(self.layer, self._mix, hidden_states)
        return (mixed, None) if self._recurrence.returns_weights else mixed

    def _mix(self, hidden: torch.Tensor, states: States, begins: bool) -> torch.Tensor:
        held = HeldStates(states, begins)
        if hidden.shape[1] == 1:
            return self._call(hidden, held)
        if begins or self._recurrence.continues_runs:
            with plain_torch():
                return self._call(hidden, held)
        return torch.cat([self._call(token, held) for token in hidden.split(1, dim=1)], dim=1)

    def _call(self, hidden: torch.Tensor, held: HeldStates) -> torch.Tensor:
        unread = dict.fromkeys(self._unread)
        mixed = self._forward(hidden, **unread, **{self._recurrence.cache_argument: held})
        found: torch.Tensor = mixed[0] if self._recurrence.returns_weights else mixed
        return found


def _without_default(forward: Callable[..., Any]) -> set[str]:
    """Parameters behind the first that must be given: positions and masks, which mixers of one sequence never read."""
    given = list(inspect.signature(forward).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in given if p.default is inspect.Parameter.empty and p.kind in named}


class HeldStates:
    """What transformers' mixers ask of a cache, over one call's states."""

    def __init__(self, states: States, begins: bool) -> None:
        self._states = states
        self._begins = begins

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """[N, C, W], or None: the layer keeps no such state yet."""
        return self._states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """[N, ...], or None: the layer keeps no such state yet."""
        return self._states.get(("recurrent", state_idx))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """conv_states [N, C, T] behind the last W -> [N, C, W + T]; the last W of these are kept."""
        width = conv_kernel_size or conv_states.shape[-1]
        kept = self._kept(("conv", state_idx), conv_states.new_zeros(*conv_states.shape[:-1], width))
        full = torch.cat([kept, conv_states], dim=-1)
        kept.copy_(full[..., -kept.shape[-1] :])
        return full

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """The new state in the place of the old one."""
        kept = self._kept(("recurrent", state_idx), recurrent_states)
        return kept.copy_(recurrent_states)

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """MiniMax's name for its recurrent state; None where the sequence begins."""
        return None if self._begins else self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, state: torch.Tensor) -> None:
        self.update_recurrent_state(state, layer_idx)

    def _kept(self, key: StateKey, at_first: torch.Tensor) -> torch.Tensor:
        """In a probe the layer's first write says what it keeps."""
        return self._states.setdefault(key, at_first)


class StateProbe:
    """Stands in for the StateCache in one forward pass, to learn what each layer would keep."""

    def __init__(self) -> None:
        self.shapes: dict[int, dict[StateKey, StateShape]] = {}

    def run(self, layer: int, mix: Mix, hidden: torch.Tensor) -> torch.Tensor:
        states: States = {}
        mixed = mix(hidden, states, True)
        self.shapes[layer] = {key: StateShape(tuple(t.shape[1:]), t.dtype) for key, t in states.items()}
        return mixed


def install(model: nn.Module, recurrence: Recurrence | None) -> None:
    """Have every mixer of `model` take its states from what `connect` names; None: the family has no mixers."""
    if recurrence is None:
        return
    for module in model.modules():
        if type(module).__name__ == recurrence.mixer:
            mixing: Any = module
            mixing.mixer = Mixer(mixing, recurrence)
            mixing.forward = mixing.mixer.forward


def connect(model: nn.Module, states: RunsMixers) -> None:
    """Tell every mixer of `model` where its states are."""
    for module in model.modules():
        mixer: Any = getattr(module, "mixer", None)
        if isinstance(mixer, Mixer):
            mixer.states = states
