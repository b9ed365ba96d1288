"""FlexOlmo (Allen AI): norms after attention and experts."""

from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax

FAMILY = Family(experts_class="FlexOlmoExperts", routing=softmax)
