"""Kolibri: sliding windows, norms after attention and experts, sigmoid of the chosen logits."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="Kolibri1Experts")
