"""Drafter: guesses the next tokens of sequences that decode, so that one step may check several of them at once.

A guess that is what the sampler draws anyway is a token for less time; another is thrown away. So drafting changes how
many steps an answer takes, and never a token (Leviathan et al., 2023, whose rejection sampling keeps distributions;
here a draw depends on seed and position alone, so comparing keeps the tokens themselves).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from moe_serve.scheduling.sequence import Sequence


class Drafter(Protocol):
    """Asked once for each step in which sequences decode."""

    def draft(self, decoding: list[Sequence], num_tokens: int, room: int) -> Mapping[Sequence, tuple[int, ...]]:
        """Guesses for some of `decoding`, at most `room` tokens in all. The step has `num_tokens` tokens without
        them."""
        ...
