"""Mixtral (Mistral AI)."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax_of_chosen

FAMILY = Family(experts_class="MixtralExperts", routing=softmax_of_chosen, plain_layers=True)
