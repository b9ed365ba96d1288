"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside a gated shared expert."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax

FAMILY = Family(experts_class="Qwen2MoeExperts", routing=softmax, plain_layers=True)
