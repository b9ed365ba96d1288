"""Kimi-K2.5 to K2.7 (Moonshot): DeepSeek-V3 as the text model beside a vision tower."""

from dataclasses import replace

from moe_serve.hf.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, same_as="deepseek_v3")
