"""Aria (Rhymes): the text model. Experts are always gated by silu, the shared ones as the config says."""

from __future__ import annotations

import re
from typing import Any

from moe_serve.hf.family import FUSED, Family
from moe_serve_kernels.cpu.expert_mlp import Activation

FC = re.compile(r"layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<part>fc[12])\.weight$")


def silu(config: Any) -> Activation:
    return Activation("silu")


FAMILY = Family(experts_class="AriaExperts", patterns=(FC, FUSED), transposed=True, activation=silu)
