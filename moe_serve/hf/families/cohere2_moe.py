"""Command A MoE (Cohere): attention and experts side by side, sliding layers with rotation."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="Cohere2MoeExperts")
