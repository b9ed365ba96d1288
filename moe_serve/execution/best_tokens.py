"""The smallest set of best tokens that together have a wanted mass, without sorting the vocabulary.

A probability's bits order as it does, so its place is found digit by digit, ten bits at a time: a sum per digit tells
in which the wanted mass is reached. Masses are integers, so a sum depends on no order, and a row on no other row.
Knows probabilities; nothing of sequences or parameters.

Shape alphabet: n rows, V vocabulary.
"""

from __future__ import annotations

import torch

DIGIT_BITS = 10
NUM_DIGITS = 3
"""30 bits: those of a float32 from 0 to 1."""
UNIT = 2.0**50
"""Mass of the probability 1. Vocabularies of 2^13 times that still add up in 63 bits."""


def with_mass(probs: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """`probs` [n, V] float32 from 0 to 1, with zeros outside the fewest best that have that fraction [n, 1] float64
    of a row's mass; the best one stays. Of equals the smaller id stays."""
    masses = (probs * UNIT).long()
    wanted = (fractions * masses.sum(-1, keepdim=True)).ceil().long()
    return torch.where(_best(probs, masses, wanted.clamp(min=1)), probs, 0.0)


def with_count(probs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The same, outside the best `counts` [n, 1] int64 tokens, each at least 1 and at most V."""
    return torch.where(_best(probs, torch.ones_like(probs, dtype=torch.int64), counts), probs, 0.0)


def _best(probs: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[n, V] bool: the fewest best whose `weights` [n, V] int64, equal for equals, reach `wanted` [n, 1]."""
    bits = probs.contiguous().view(torch.int32)
    last, missing = _last_kept(bits, weights, wanted)
    is_last = bits == last
    weight = torch.where(is_last, weights, 0).amax(-1, keepdim=True).clamp(min=1)
    num_last = (missing + weight - 1) // weight
    return (bits > last) | (is_last & (is_last.cumsum(-1) <= num_last))


def _last_kept(bits: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits [n, 1] at which the sum from above reaches `wanted`, and what the larger ones leave of it."""
    prefix = torch.zeros_like(wanted, dtype=torch.int32)
    for place in reversed(range(NUM_DIGITS)):
        seen = bits >> place * DIGIT_BITS
        own = torch.where(seen >> DIGIT_BITS == prefix, weights, 0)
        sums = torch.zeros(len(bits), 1 << DIGIT_BITS, dtype=torch.int64, device=bits.device)
        sums.scatter_add_(1, (seen & (1 << DIGIT_BITS) - 1).long(), own)
        from_above = sums.flip(1).cumsum(1)
        index = (from_above < wanted).sum(1, keepdim=True).clamp(max=(1 << DIGIT_BITS) - 1)
        digit = (1 << DIGIT_BITS) - 1 - index
        wanted = wanted - (from_above.gather(1, index) - sums.gather(1, digit))
        prefix = (prefix << DIGIT_BITS) | digit.int()
    return prefix, wanted
