"""Gemma 4 (Google): the text model. Experts lie beside a dense MLP in each layer; heads differ by layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from moe_serve.hf.family import Family

FUSED = re.compile(r"layers\.(?P<layer>\d+)\.experts\.(?P<part>gate_up_proj|down_proj)$")
PER_EXPERT = re.compile(
    r"layers\.(?P<layer>\d+)\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight$"
)


def adapt(model: nn.Module, config: Any) -> None:
    """A bf16 model's embedding scales were rounded to bf16 when it was built; in float32 they are whole again."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.full_like(module.embed_scale, module.scalar_embed_scale, dtype=torch.float32)


FAMILY = Family(experts_class="Gemma4TextExperts", patterns=(PER_EXPERT, FUSED), adapt=adapt)
