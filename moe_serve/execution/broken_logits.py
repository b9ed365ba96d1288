"""Logits that are no numbers: their requests end with an error, the others go on.

A NaN or an infinity in weights or activations reaches the logits of its own sequence only. Knows logits; knows no
model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import torch

MESSAGE = "the model's logits are not finite: a weight or an activation is a NaN or an infinity"


def find(logits: torch.Tensor, rows: Rows[int]) -> dict[int, str]:
    """What clients are told, for each of the batch's `rows` [n] whose logits are not finite; `logits` [n or more, V]
    begin with those of `rows`."""
    return {rows[i]: MESSAGE for i in _broken(logits[: len(rows)])}


def _broken(logits: torch.Tensor) -> list[int]:
    """Rows with a number that is not finite."""
    # A sum is not finite where a number is not; only then is it worth looking at every number.
    if all(map(math.isfinite, logits.sum(dim=-1, dtype=torch.float32).tolist())):
        return []
    broken: list[int] = (~logits.isfinite().all(dim=-1)).nonzero()[:, 0].tolist()
    return broken
