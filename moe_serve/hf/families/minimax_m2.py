"""MiniMax-M2, 2.1, 2.5 and 2.7: sigmoid routing whose correction belongs to the block."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="MiniMaxM2Experts")
