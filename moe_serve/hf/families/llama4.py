"""Llama 4 Scout and Maverick (Meta): the text model. Attention in chunks, some layers without positions; the router
scales what an expert reads, not what it says."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from moe_serve.errors import UnsupportedModelError
from moe_serve.hf.family import Family

FUSED = re.compile(r"layers\.(?P<layer>\d+)\.feed_forward\.experts\.(?P<part>gate_up_proj|down_proj)$")


class Block:
    """Stands in the place of one MoE block's forward, which would give every expert every token."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, T, H] -> ([T, H], logits [T, E])."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self._block.router(hidden)
        chosen = logits.argmax(dim=1, keepdim=True)
        score = scores.gather(1, chosen)
        routed = self._block.experts(hidden * score, chosen, torch.ones_like(score))
        return self._block.shared_expert(hidden) + routed, logits


class QueryScales:
    """What layers without positions multiply queries by, given each token's own position."""

    def __init__(self, attention: Any) -> None:
        self._floor: float = attention.floor_scale
        self._strength: float = attention.attn_scale

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """positions [1, T] -> [1, 1, T, 1] float32."""
        steps = torch.floor((positions.float() + 1) / self._floor)
        return (torch.log1p(steps) * self._strength + 1)[:, None, :, None]


def adapt(model: nn.Module, config: Any) -> None:
    if config.num_experts_per_tok != 1:
        raise UnsupportedModelError(
            f"num_experts_per_tok is {config.num_experts_per_tok}; llama4 is served with one expert per token"
        )
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module).__name__ == "Llama4TextMoe":
            module.forward = Block(module).forward
        elif getattr(module, "attn_temperature_tuning", False) is True and not module.use_rope:
            module.attn_temperature_tuning = False
            module.query_scales = QueryScales(module)


FAMILY = Family(experts_class="Llama4TextExperts", patterns=(FUSED,), transposed=True, adapt=adapt)
