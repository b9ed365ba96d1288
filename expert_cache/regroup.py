"""Regrouping: the step's (token, choice) pairs sorted by expert, so each expert runs once.

Shape alphabet: T tokens, K choices per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Pairs in ascending order of expert; within an expert in ascending order of pair.

    Example, T = 3, K = 2, ids = [[2, 0], [0, 1], [2, 1]]: pairs 0..5 have experts 2 0 0 1 2 1, so
    pairs = [1, 2, 3, 5, 0, 4], tokens = pairs // K = [0, 1, 1, 2, 0, 2], counts = [2, 2, 2].
    """

    pairs: torch.Tensor
    """[T*K] int64."""
    tokens: torch.Tensor
    """[T*K] int64: token of each sorted pair."""
    counts: list[int]
    """Pairs of each expert; ids outside 0..E-1 do not occur."""

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(expert, start, end) of each expert with at least one pair, in sorted order."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, start, start + count
                start += count


def regroup(ids: torch.Tensor, num_experts: int) -> Regrouped:
    """Sort the pairs of `ids` [T, K] by expert."""
    flat = ids.flatten()
    pairs = flat.argsort(stable=True)
    tokens = pairs.div(ids.shape[1], rounding_mode="floor")
    return Regrouped(pairs, tokens, torch.bincount(flat, minlength=num_experts).tolist())
