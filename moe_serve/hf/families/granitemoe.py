"""Granite MoE (IBM): fused 3-D expert tensors under names of their own."""

import re

from moe_serve.hf.family import FUSED, PER_EXPERT, Family
from moe_serve.hf.routings import softmax_of_chosen

GRANITE = re.compile(r"layers\.(?P<layer>\d+)\.block_sparse_moe\.(?P<part>input_linear|output_linear)\.weight$")

FAMILY = Family(
    experts_class="GraniteMoeExperts",
    patterns=(GRANITE, PER_EXPERT, FUSED),
    routing=softmax_of_chosen,
    plain_layers=True,
)
