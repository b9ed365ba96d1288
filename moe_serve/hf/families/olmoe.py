"""OLMoE (Allen AI)."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="OlmoeExperts")
