"""Flint: sinks, sliding and position-free layers, sigmoid routing."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="FlintExperts")
