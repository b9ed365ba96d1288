"""The operations of a Mixture-of-Experts layer, each beside the reference it must match.

torch and triton only; knows nothing of models, caches or requests. The folder above this package
is deliberately no package: an importable `kernels` breaks transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "Activation",
    "LinearWeights",
    "MLPWeights",
    "expert_mlp",
    "linear",
    "load_library",
]
HOMES = {
    "Activation": "cpu.expert_mlp:Activation",
    "LinearWeights": "cpu.linear:LinearWeights",
    "MLPWeights": "cpu.expert_mlp:MLPWeights",
    "expert_mlp": "cpu.expert_mlp:expert_mlp",
    "linear": "cpu.linear:linear",
    "load_library": "cpu.library:load",
}
"""Public name -> the module that defines it, and its name there."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = HOMES[name].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
