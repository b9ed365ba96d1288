"""GPT-OSS (OpenAI): transposed, interleaved, biased experts with a clamped gate, and attention sinks."""

from moe_serve.hf.activations import clamped
from moe_serve.hf.family import Family
from moe_serve.hf.routings import softmax_of_chosen

FAMILY = Family(
    experts_class="GptOssExperts",
    transposed=True,
    interleaved=True,
    activation=clamped,
    routing=softmax_of_chosen,
    plain_layers=True,
)
