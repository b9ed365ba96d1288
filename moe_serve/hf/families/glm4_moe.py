"""GLM-4.5 MoE."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="Glm4MoeExperts")
