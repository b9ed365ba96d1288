"""MiMo-V2-Flash (Xiaomi): sliding windows with sinks, DeepSeek-V3's routing."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(experts_class="MiMoV2FlashExperts", routing=sigmoid_in_groups)
