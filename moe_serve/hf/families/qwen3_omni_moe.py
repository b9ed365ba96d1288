"""Qwen3-Omni: the thinker's text model, which is Qwen3-MoE where all positions are a text's. Speech is left out."""

import re
from dataclasses import replace

from moe_serve.hf.families.qwen3_moe import FAMILY as QWEN3_MOE

THINKER = re.compile(
    r"^(?:thinker\.)?(?:model\.)?(?:language_model\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\."
    r"(?P<part>gate_proj|up_proj|down_proj)\.weight$"
)
FUSED = re.compile(
    r"^(?:thinker\.)?(?:model\.)?(?:language_model\.)?layers\.(?P<layer>\d+)\.mlp\.experts\."
    r"(?P<part>gate_up_proj|down_proj)$"
)

FAMILY = replace(QWEN3_MOE, same_as="qwen3_moe", patterns=(THINKER, FUSED))
