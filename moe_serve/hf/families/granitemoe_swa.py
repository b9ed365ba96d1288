"""Granite MoE with sliding windows and sinks."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax_of_chosen

FAMILY = Family(experts_class="GraniteMoeSWAExperts", routing=softmax_of_chosen)
