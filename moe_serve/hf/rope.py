"""Position rules that depend on a length: one length for the server, and none from the batch.

transformers chooses longrope's factors, and dynamic NTK's base, by the largest position of a batch. A sequence's
tokens would depend on the others beside it, and keys in the cache on when they were computed. Here the choice is made
once, from max_model_len, as vLLM does. A server of short sequences says so with --max-model-len: up to
`original_max_position_embeddings` it takes the short factors.

Phi-3.5-MoE computes its rotation on the CPU and asks the device for the largest position, in every step, which no CUDA
graph can hold. On a GPU a table of all positions stands in its place.

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


def table_of(embedding: Any, like: torch.Tensor, positions: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, half] of a rotary embedding, on the device of `like`."""
    turns = embedding(like, torch.arange(positions, device=like.device)[None])
    parts = (turns.real, turns.imag) if isinstance(turns, torch.Tensor) else turns
    # Some families repeat the values for the other half of a head.
    cos, sin = (part[0, :, :half] for part in parts)
    return cos, sin


def tabulate(model: nn.Module, max_model_len: int, device: torch.device) -> None:
    """Put a table on `device` in the place of every rotary embedding of `model`; after `fix_length`, if at all."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "rope_init_fn"):
                setattr(parent, name, Tabulated(child, max_model_len, device))


class Tabulated(nn.Module):
    """A rotary embedding as a table of what it gives for each position."""

    def __init__(self, embedding: nn.Module, positions: int, device: torch.device) -> None:
        super().__init__()
        cos, sin = embedding(torch.empty(0, device=device), torch.arange(positions, device=device)[None])
        self._cos, self._sin = cos[0], sin[0]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [.., T] -> cosines and sines [.., T, D] of x's dtype."""
        return self._cos[position_ids].to(x.dtype), self._sin[position_ids].to(x.dtype)
