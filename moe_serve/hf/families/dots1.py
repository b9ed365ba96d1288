"""dots.llm1: DeepSeek-V3's routing, query and key norms."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(experts_class="Dots1Experts", routing=sigmoid_in_groups, plain_layers=True)
