"""GLM-4.5 MoE."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(experts_class="Glm4MoeExperts", routing=sigmoid_in_groups, plain_layers=True)
