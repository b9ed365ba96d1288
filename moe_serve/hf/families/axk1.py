"""A.X-K1 (SK Telecom): latent attention, a norm after the experts' sum."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(experts_class="AXK1Experts", routing=sigmoid_in_groups)
