"""ERNIE 4.5 MoE (Baidu)."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import renormalized

FAMILY = Family(experts_class="Ernie4_5_MoeExperts", routing=renormalized, plain_layers=True, rotary="neighbours")
