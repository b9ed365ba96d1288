"""Position rules that depend on a length: one length for the server, and none from the batch.

transformers chooses longrope's factors, and dynamic NTK's base, by the largest position of a batch. A sequence's
tokens would depend on the others beside it, and keys in the cache on when they were computed. Here the choice is made
once, from max_model_len, as vLLM does. A server of short sequences says so with --max-model-len: up to
`original_max_position_embeddings` it takes the short factors.

Knows no batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def fix_length(model: nn.Module, max_model_len: int) -> None:
    """Let every rotary embedding of `model` choose as for a sequence of `max_model_len` tokens."""
    for module in model.modules():
        if _depends_on_length(module):
            _Fixed(max_model_len - 1).install(module)


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named)


class _Fixed:
    """Adds one position, the last that the server allows, and takes its row out of the result."""

    def __init__(self, last: int) -> None:
        self._last = last

    def install(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._add, with_kwargs=True)
        module.register_forward_hook(self._cut)

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`position_ids` [..., T] -> [..., T + 1]; they come second, or by name."""
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._longer(kwargs["position_ids"])}
        return (args[0], self._longer(args[1]), *args[2:]), kwargs

    def _longer(self, positions: torch.Tensor) -> torch.Tensor:
        last = torch.full_like(positions[..., :1], self._last)
        return torch.cat([positions.clamp(max=self._last), last], dim=-1)

    def _cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Cosines and sines, or both as complex numbers: [..., T + 1, D] -> [..., T, D]."""
        if isinstance(output, torch.Tensor):
            return output[..., :-1, :]
        return tuple(table[..., :-1, :] for table in output)
