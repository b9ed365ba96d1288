"""Laguna (Poolside): soft-capped sigmoid routing, gated attention output."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="LagunaExperts")
