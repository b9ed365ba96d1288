"""DeepSeek-V2 and -V2-Lite: latent attention, shared experts, leading dense layers."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import greedy

FAMILY = Family(experts_class="DeepseekV2Experts", routing=greedy, plain_layers=True, rotary="neighbours")
