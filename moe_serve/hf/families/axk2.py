"""A.X-K2 (SK Telecom): latent attention to the tokens that an indexer chooses, gated norms; its Light has no groups."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import sigmoid_in_groups
from moe_serve.hf.sparse_attention import install

FAMILY = Family(experts_class="AXK2Experts", routing=sigmoid_in_groups, adapt=install, widened=("weights_proj",))
