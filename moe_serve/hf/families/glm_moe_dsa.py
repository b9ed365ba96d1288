"""GLM-5, 5.1 and 5.2 (Z.ai): DeepSeek-V3.2's sparse attention, whose choice several layers share."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups
from moe_serve.hf.sparse_attention import install

FAMILY = Family(experts_class="GlmMoeDsaExperts", routing=sigmoid_in_groups, adapt=install, widened=("weights_proj",))
