"""Beam: sigmoid routing in groups, sums that are scaled by depth, full layers without positions."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="BeamExperts")
