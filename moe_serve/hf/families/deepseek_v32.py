"""DeepSeek-V3.2: V3 with sparse attention to the tokens that an indexer chooses."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups
from moe_serve.hf.sparse_attention import install

FAMILY = Family(experts_class="DeepseekV32Experts", routing=sigmoid_in_groups, adapt=install, widened=("weights_proj",))
