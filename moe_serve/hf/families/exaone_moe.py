"""EXAONE MoE (LG): DeepSeek-V3's routing, sliding and position-free layers."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(experts_class="ExaoneMoeExperts", routing=sigmoid_in_groups)
