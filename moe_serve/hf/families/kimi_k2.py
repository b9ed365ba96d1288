"""Kimi-K2 (Moonshot): DeepSeek-V3 under a name of its own."""

from dataclasses import replace

from moe_serve.hf.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, same_as="deepseek_v3")
