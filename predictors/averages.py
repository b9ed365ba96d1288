"""Decayed averages of past uses, and how soon an expert is used again: the same recursion, forwards and backwards.

Knows numpy only.

Shape alphabet: N tokens of a trace, R rates, L layers, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictors.streams import multi_hot
from predictors.trace import RoutingTrace

Array = npt.NDArray[np.float32]


def past_averages(trace: RoutingTrace, rate: float) -> Array:
    """[N, L, E]: uses per token as an average over the same sequence's earlier tokens; the newest weighs 1 - rate."""
    out = np.zeros((trace.num_tokens, trace.num_layers, trace.num_experts), dtype=np.float32)
    for rows in trace.sequence_slices():
        used = multi_hot(trace.ids[rows].astype(np.int32), trace.num_experts)
        for n in range(1, len(used)):
            np.multiply(out[rows.start + n - 1], rate, out=out[rows.start + n])
            out[rows.start + n] += (1 - rate) * used[n - 1]
    return out


def next_use_values(trace: RoutingTrace, discount: float) -> Array:
    """[N, L, E]: discount ** (tokens between this one and the next that uses the expert); 0 if none does.

    1 for an expert that the next token uses. It orders experts by their next use, which is what an ideal eviction
    goes by (Belady), and its average over what may happen is what a forecast can aim at.
    """
    out = np.zeros((trace.num_tokens, trace.num_layers, trace.num_experts), dtype=np.float32)
    for rows in trace.sequence_slices():
        used = multi_hot(trace.ids[rows].astype(np.int32), trace.num_experts)
        for n in range(len(used) - 2, -1, -1):
            np.maximum(used[n + 1], discount * out[rows.start + n + 1], out=out[rows.start + n])
    return out
