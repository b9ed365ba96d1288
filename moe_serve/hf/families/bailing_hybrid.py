"""Ling and Ring hybrids (inclusionAI): Kimi delta attention, latent attention in the last layer of each group."""

from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(
    experts_class="BailingHybridExperts",
    routing=sigmoid_in_groups,
    recurrence=Recurrence(mixer="BailingHybridDeltaAttention"),
)
