"""Trinity (Arcee): sliding and position-free layers, gated attention output, four norms."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="AfmoeExperts")
