"""Qwen3-Next and Qwen3-Coder-Next: three gated delta nets for each full attention, a shared expert."""

from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence
from moe_serve.hf.routings import softmax

FAMILY = Family(
    experts_class="Qwen3NextExperts", routing=softmax, recurrence=Recurrence(mixer="Qwen3NextGatedDeltaNet")
)
