"""Granite MoE with a shared MLP beside the experts (IBM)."""

from dataclasses import replace

from moe_serve.hf.families.granitemoe import FAMILY as GRANITEMOE

FAMILY = replace(GRANITEMOE, experts_class="GraniteMoeSharedExperts", plain_layers=False)
