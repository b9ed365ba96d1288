"""ExpertsProxy: stands where transformers' experts class stood, without any parameters.

transformers builds it while loading, so expert weights never enter the dense model; afterwards
`connect` tells each instance its MoE layer and whom to call. Here decoder layers become MoE layers. Knows no weights.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from moe_serve.hf.plain_torch import plain_torch
from predictors.shape import MoELayer

LAYER = re.compile(r"\.layers\.(\d+)\.")
_registry_lock = threading.Lock()
"""transformers' patch registry is process-wide; two loads at once would see each other's entry."""


class RunsExperts(Protocol):
    """The part of Experts that a MoE block needs."""

    def run(self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See Experts."""
        ...


class ExpertsProxy(nn.Module):
    """The call a MoE block makes to its experts, handed on to what runs them."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.layer = MoELayer(-1)
        self.experts: RunsExperts | None = None

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H]."""
        if self.experts is None:  # the KV shape probe runs before experts are connected
            return torch.zeros_like(hidden_states)
        with plain_torch():
            return self.experts.run(self.layer, hidden_states, top_k_index, top_k_weights)


def find_experts(model: nn.Module) -> dict[int, ExpertsProxy]:
    """Our modules by decoder layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertsProxy):
            match = LAYER.search(f".{name}.")
            assert match, f"{name} does not say which layer it is in"
            found[int(match[1])] = module
    return found


def moe_layers(model: nn.Module) -> dict[int, MoELayer]:
    """The MoE layers of `model` by decoder layer."""
    return {decoder_layer: MoELayer(i) for i, decoder_layer in enumerate(sorted(find_experts(model)))}


def connect(model: nn.Module, experts: RunsExperts) -> None:
    """Tell every ExpertsProxy of `model` its layer and whom to call."""
    layers = moe_layers(model)
    for decoder_layer, module in find_experts(model).items():
        module.layer = layers[decoder_layer]
        module.experts = experts


@contextmanager
def replacing(experts_class: str) -> Iterator[None]:
    """While open, transformers builds ExpertsProxy wherever it would build `experts_class`."""
    with _registry_lock:
        originals = _classes_named(experts_class)
        register_patch_mapping({experts_class: ExpertsProxy})
        try:
            yield
        finally:
            unregister_patch_mapping([experts_class])
            # transformers restores the classes only when loading succeeded.
            for module, original in originals:
                setattr(module, experts_class, original)


def _classes_named(name: str) -> list[tuple[Any, type]]:
    modules = [m for key, m in list(sys.modules.items()) if m is not None and key.startswith("transformers.models.")]
    return [(m, m.__dict__[name]) for m in modules if isinstance(m.__dict__.get(name), type)]
