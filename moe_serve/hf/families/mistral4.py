"""Mistral Small 4: latent attention and DeepSeek-V3's routing; the text model of a Mistral 3 checkpoint."""

from moe_serve.hf.family import Family

FAMILY = Family(experts_class="Mistral4Experts", model_class="Mistral4ForCausalLM")
