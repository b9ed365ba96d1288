"""MiniMax-Text-01 and M1: seven lightning attentions for each full attention."""

from moe_serve.hf.family import Family
from moe_serve.hf.recurrent import Recurrence
from moe_serve.hf.routings import renormalized

FAMILY = Family(
    experts_class="MiniMaxExperts",
    routing=renormalized,
    recurrence=Recurrence(
        mixer="MiniMaxLightningAttention",
        cache_argument="past_key_values",
        continues_runs=False,
        returns_weights=True,
    ),
)
