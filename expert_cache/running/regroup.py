"""Regrouping: the step's (token, choice) pairs sorted by expert, so each expert runs once.

Shape alphabet: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Pairs in ascending order of expert; within an expert in ascending order of pair.

    Example, T = 3, K = 2, ids = [[2, 0], [0, 1], [2, 1]]: pairs 0..5 have experts 2 0 0 1 2 1, so
    pairs = [1, 2, 3, 5, 0, 4], tokens = pairs // K = [0, 1, 1, 2, 0, 2], experts = [0, 1, 2],
    counts = [2, 2, 2], segments = {0: (0, 2), 1: (2, 4), 2: (4, 6)}.
    """

    pairs: torch.Tensor
    """[T*K] int64."""
    tokens: torch.Tensor
    """[T*K] int64: token of each sorted pair."""
    experts: list[int]
    """Those with at least one pair, ascending."""
    counts: list[int]
    """Pairs of each of `experts`."""
    segments: dict[int, tuple[int, int]]
    """(start, end) of each expert's pairs in sorted order."""


def regroup(ids: torch.Tensor, num_experts: int) -> Regrouped:
    """Sort the pairs of `ids` [T, K] by expert."""
    pairs = torch.arange(ids.numel(), device=ids.device)
    return regroup_pairs(ids.flatten(), pairs.div(ids.shape[1], rounding_mode="floor"), num_experts)


def regroup_pairs(expert_of: torch.Tensor, token_of: torch.Tensor, num_experts: int) -> Regrouped:
    """Sort pairs by expert: pair p is token token_of[p] and expert expert_of[p], both [P] int64."""
    pairs = expert_of.argsort(stable=True)
    experts, counts, segments, start = [], [], {}, 0
    for expert, count in enumerate(torch.bincount(expert_of, minlength=num_experts).tolist()):
        if count:
            experts.append(expert)
            counts.append(count)
            segments[expert] = start, start + count
            start += count
    return Regrouped(pairs, token_of[pairs], experts, counts, segments)
