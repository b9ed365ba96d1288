"""Granite 4 (IBM): Mamba-2 layers beside attention, Granite's experts and a shared MLP."""

from dataclasses import replace

from moe_serve.hf.families.granitemoe import FAMILY as GRANITEMOE
from moe_serve.hf.recurrent import Recurrence

FAMILY = replace(
    GRANITEMOE,
    experts_class="GraniteMoeHybridExperts",
    plain_layers=False,
    recurrence=Recurrence(mixer="GraniteMoeHybridMambaLayer"),
)
