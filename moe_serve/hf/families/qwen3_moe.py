"""Qwen3-MoE: many small experts, no shared one."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax

FAMILY = Family(experts_class="Qwen3MoeExperts", routing=softmax, plain_layers=True)
