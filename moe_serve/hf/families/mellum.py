"""Mellum (JetBrains): Qwen3-MoE's layers with sliding windows."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax

FAMILY = Family(experts_class="MellumExperts", routing=softmax)
