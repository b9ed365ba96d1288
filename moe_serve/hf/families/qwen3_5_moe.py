"""Qwen3.5 and Qwen3.6 MoE: the text model, as Qwen3-Next with other projections, beside a vision tower."""

from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence
from moe_serve.hf.routings import renormalized

FAMILY = Family(
    experts_class="Qwen3_5MoeExperts", routing=renormalized, recurrence=Recurrence(mixer="Qwen3_5MoeGatedDeltaNet")
)
