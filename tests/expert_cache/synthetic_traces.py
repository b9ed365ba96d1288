"""Traces for cache tests: from hypothesis, from a seed with sticky and popular experts, and tiny ones by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from predictors.trace import RoutingTrace, offsets_of


def trace_of(sets: Sequence[Sequence[Sequence[int]]], num_experts: int, lengths: Sequence[int] = ()) -> RoutingTrace:
    """From ids [N][L][K]."""
    ids = np.array(sets)
    return RoutingTrace(ids, offsets_of(lengths or [len(ids)]), np.arange(ids.shape[1], dtype=np.int32), num_experts)


def sticky_trace(
    num_tokens: int = 120, num_layers: int = 3, num_experts: int = 16, top_k: int = 3, seed: int = 0
) -> RoutingTrace:
    """Popular experts are chosen more often, and those of the last token more often still; with weights."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_layers, num_experts))
    ids = np.empty((num_tokens, num_layers, top_k), dtype=np.int64)
    recent = np.zeros((num_layers, num_experts))
    for n in range(num_tokens):
        noisy = logits + recent + rng.gumbel(size=logits.shape)
        ids[n] = np.argsort(-noisy, axis=1)[:, :top_k]
        recent *= 0.5
        np.put_along_axis(recent, ids[n], 1.5, axis=1)
    weights = rng.random(ids.shape, dtype=np.float32)
    cuts = [num_tokens // 2, num_tokens - num_tokens // 2]
    return RoutingTrace(ids, offsets_of(cuts), np.arange(num_layers, dtype=np.int32), num_experts, weights)


@st.composite
def small_traces(draw: st.DrawFn) -> RoutingTrace:
    """Up to 12 tokens, 2 layers, 6 experts, any routing."""
    num_experts = draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(3, num_experts)))
    num_layers = draw(st.integers(1, 2))
    experts = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    tokens = draw(st.lists(st.lists(experts, min_size=num_layers, max_size=num_layers), min_size=1, max_size=12))
    first = draw(st.integers(1, len(tokens)))
    return trace_of(tokens, num_experts, [first, len(tokens) - first] if first < len(tokens) else [first])
