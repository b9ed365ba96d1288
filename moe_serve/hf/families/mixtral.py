"""Mixtral (Mistral AI)."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="MixtralExperts")
