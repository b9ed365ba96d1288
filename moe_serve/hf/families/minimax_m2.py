"""MiniMax-M2, 2.1, 2.5, 2.7: sigmoid routing whose correction belongs to the block; norms over all heads together."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import renormalized_sigmoid

FAMILY = Family(experts_class="MiniMaxM2Experts", routing=renormalized_sigmoid, plain_layers=True)
