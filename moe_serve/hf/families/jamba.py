"""Jamba (AI21): Mamba layers, some attention, experts in every second layer."""

import re

from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence

EXPERTS = re.compile(
    r"layers\.(?P<layer>\d+)\.feed_forward\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight$"
)
FUSED = re.compile(r"layers\.(?P<layer>\d+)\.feed_forward\.experts\.(?P<part>gate_up_proj|down_proj)$")

FAMILY = Family(
    experts_class="JambaExperts",
    patterns=(EXPERTS, FUSED),
    recurrence=Recurrence(mixer="JambaMambaMixer", continues_runs=False),
    widened=("dt_proj",),
)
