"""Nemotron-3 Nano and Super (NVIDIA): Mamba-2, attention and MoE layers apart; experts without a gate."""

import re

from moe_serve.hf.activations import relu_squared
from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence
from moe_serve.hf.routings import sigmoid_in_groups

EXPERTS = re.compile(r"layers\.(?P<layer>\d+)\.mixer\.experts\.(?P<expert>\d+)\.(?P<part>up_proj|down_proj)\.weight$")
FUSED = re.compile(r"layers\.(?P<layer>\d+)\.mixer\.experts\.(?P<part>up_proj|down_proj)$")

FAMILY = Family(
    experts_class="NemotronHExperts",
    patterns=(EXPERTS, FUSED),
    has_gate=False,
    activation=relu_squared,
    routing=sigmoid_in_groups,
    recurrence=Recurrence(mixer="NemotronHMamba2Mixer"),
)
