"""Qwen3-VL MoE: the text model, which is Qwen3-MoE where all positions are a text's. The Hub has transposed experts."""

from dataclasses import replace

from moe_serve.hf.families.qwen3_moe import FAMILY as QWEN3_MOE
from moe_serve.hf.routings import renormalized

FAMILY = replace(QWEN3_MOE, same_as="qwen3_moe", sets={"norm_topk_prob": True}, transposed=None, routing=renormalized)
