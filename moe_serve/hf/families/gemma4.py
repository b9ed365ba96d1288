"""Gemma 4 (Google): the text model. Experts lie beside a dense MLP in each layer; heads differ by layer."""

import re

from moe_serve.hf.family import Family

FUSED = re.compile(r"layers\.(?P<layer>\d+)\.experts\.(?P<part>gate_up_proj|down_proj)$")
PER_EXPERT = re.compile(
    r"layers\.(?P<layer>\d+)\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight$"
)

FAMILY = Family(experts_class="Gemma4TextExperts", patterns=(PER_EXPERT, FUSED))
