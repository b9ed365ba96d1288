"""OLMoE (Allen AI)."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax

FAMILY = Family(experts_class="OlmoeExperts", routing=softmax, plain_layers=True)
