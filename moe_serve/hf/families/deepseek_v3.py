"""DeepSeek-V3 and -R1: as V2, with sigmoid routing and a correction bias."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="DeepseekV3Experts")
