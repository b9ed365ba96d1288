"""DeepSeek-V3 and -R1: as V2, with sigmoid routing and a correction bias."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(
    experts_class="DeepseekV3Experts", routing=sigmoid_in_groups, plain_layers=True, rotary="neighbours_to_halves"
)
