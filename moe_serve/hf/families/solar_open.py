"""Solar Open (Upstage): DeepSeek-V3's routing, a shared expert."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups

FAMILY = Family(experts_class="SolarOpenExperts", routing=sigmoid_in_groups, plain_layers=True)
