"""Kimi-Linear (Moonshot): three Kimi delta attentions for each latent attention, DeepSeek-V3's routing."""

from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(
    experts_class="KimiLinearExperts",
    routing=sigmoid_in_groups,
    recurrence=Recurrence(mixer="KimiLinearDeltaAttention"),
)
