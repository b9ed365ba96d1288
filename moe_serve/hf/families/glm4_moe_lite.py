"""GLM-4.7-Flash: latent attention, sigmoid routing, a shared expert, leading dense layers."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(
    experts_class="Glm4MoeLiteExperts", routing=sigmoid_in_groups, plain_layers=True, rotary="neighbours_to_halves"
)
