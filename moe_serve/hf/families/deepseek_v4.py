"""DeepSeek-V4 Flash and Pro: compressed attention, several residual streams, first layers that route by token id."""

import re

from moe_serve.hf.activations import limited
from moe_serve.hf.compressed_attention import install
from moe_serve.hf.family import FUSED, Family

PER_EXPERT = re.compile(r"layers\.(?P<layer>\d+)\.(?:ffn|mlp)\.experts\.(?P<expert>\d+)\.(?P<part>w[123])\.weight$")

FAMILY = Family(experts_class="DeepseekV4Experts", patterns=(PER_EXPERT, FUSED), activation=limited, adapt=install)
