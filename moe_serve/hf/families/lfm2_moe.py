"""LFM2-8B-A1B and LFM2.5 (Liquid AI): short convolutions beside attention, sigmoid routing."""

import re

from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence

EXPERTS = re.compile(r"layers\.(?P<layer>\d+)\.feed_forward\.experts\.(?P<expert>\d+)\.(?P<part>w[123])\.weight$")
FUSED = re.compile(r"layers\.(?P<layer>\d+)\.feed_forward\.experts\.(?P<part>gate_up_proj|down_proj)$")

FAMILY = Family(
    experts_class="Lfm2MoeExperts",
    patterns=(EXPERTS, FUSED),
    recurrence=Recurrence(mixer="Lfm2MoeShortConv", cache_argument="past_key_values"),
)
