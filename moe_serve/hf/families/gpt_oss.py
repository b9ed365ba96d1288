"""GPT-OSS (OpenAI): transposed, interleaved, biased experts with a clamped gate, and attention sinks."""

from expert_cache.activations import clamped
from moe_serve.hf.family import Family

FAMILY = Family(experts_class="GptOssExperts", transposed=True, interleaved=True, activation=clamped)
