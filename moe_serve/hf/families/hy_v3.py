"""Hunyuan V3: sigmoid routing whose correction belongs to the block."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="HYV3Experts")
