"""Requests whose logits are no numbers: each ends with an error, the others go on.

A NaN or an infinity in weights or activations reaches the logits of its own sequence only. Knows a plan and logits;
knows no model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Rows

import torch

from moe_serve.execution.forward_batch import by_sequence
from moe_serve.scheduling.batch_plan import BatchPlan
from moe_serve.scheduling.sequence import Sequence

log = logging.getLogger(__name__)

MESSAGE = "the model's logits are not finite: a weight or an activation is a NaN or an infinity"


def find(plan: BatchPlan, logits: torch.Tensor, rows: Rows[int]) -> dict[Sequence, str]:
    """What the sequences are told whose logits are not finite; `logits` [n or more, V] begin with those of
    the batch's `rows` [n]."""
    found = by_sequence(plan, {rows[i]: MESSAGE for i in _broken(logits[: len(rows)])})
    for seq in found:
        log.error("request %s ends with an error: %s", seq.request.request_id, MESSAGE)
    return found


def _broken(logits: torch.Tensor) -> list[int]:
    """Rows with a number that is not finite."""
    # A sum is not finite where a number is not; only then is it worth looking at every number.
    if all(map(math.isfinite, logits.sum(dim=-1, dtype=torch.float32).tolist())):
        return []
    broken: list[int] = (~logits.isfinite().all(dim=-1)).nonzero()[:, 0].tolist()
    return broken
