"""Hunyuan-A13B: renormalised softmax routing, a shared expert."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="HunYuanMoEV1Experts")
