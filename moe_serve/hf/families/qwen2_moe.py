"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside a gated shared expert."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="Qwen2MoeExperts")
