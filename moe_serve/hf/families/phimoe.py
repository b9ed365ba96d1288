"""Phi-3.5-MoE: sparse-mixer routing; the sliding window is applied through the mask alone."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="PhimoeExperts", masks_by_config_window=True, tabulates_rotary=True)
