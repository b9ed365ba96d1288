"""How the supported families choose experts: what a routing kernel has to know, and its definition. Needs no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Routing:
    """How a family chooses."""

    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_of_chosen"]
    renormalize: bool = False
    """Divide the weights by their sum."""
    scaling: float = 1.0
    """Multiply the weights, last of all."""
    num_groups: int = 1
    top_groups: int = 1
    """Only experts in the best groups can be chosen."""
    best_of_group: Literal[1, 2] = 2
    """A group's score is the sum of this many of its best experts: one in DeepSeek-V2, two in DeepSeek-V3."""
