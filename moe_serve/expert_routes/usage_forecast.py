"""UsageForecast: what each sequence will use next, from what its own last tokens used.

Successive tokens of a sequence share experts far more often than tokens of different sequences. So the decaying
average of a sequence's use of each expert is a forecast that costs one pass over [L, E] per token and needs no
training. On DeepSeek-V2-Lite's routes a short memory did best (docs/log/policies.md). Knows no torch.

Shape alphabet: C sequences, L MoE layers, E experts per layer, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_serve.scheduling.batch_plan import BatchPlan, StepResult
from moe_serve.scheduling.sequence import Sequence
from predictors.predictor import RouterShape

DECAY = 0.6
"""Per token: an average over about the last 2.5 tokens."""
PROMPT_TOKENS = 32
"""The newest tokens of a step that count; older ones have no weight."""


class UsageForecast:
    """A RouteObserver and Forecasts in one."""

    wants_weights = False

    def __init__(self, shape: RouterShape) -> None:
        num_layers, self._num_experts = len(shape.layer_ids), shape.num_experts
        self._first_cell = np.arange(num_layers)[:, None] * shape.num_experts
        self._unknown = np.zeros(num_layers * shape.num_experts, np.float32)
        self._usage: dict[Sequence, npt.NDArray[np.float32]] = {}

    def of(self, sequences: list[Sequence]) -> npt.NDArray[np.float32]:
        """[C, L * E]."""
        return np.stack([self._usage.get(seq, self._unknown) for seq in sequences])

    def on_routes(self, plan: BatchPlan, result: StepResult) -> None:
        assert result.routes is not None
        for item, rows in zip(plan.scheduled, result.routes.rows, strict=True):
            stop = rows.start + item.num_kept
            newest = slice(max(rows.start, stop - PROMPT_TOKENS), stop)
            self.observe(item.seq, result.routes.ids[newest])
        for seq in [s for s in self._usage if s.is_finished]:
            del self._usage[seq]

    def observe(self, seq: Sequence, ids: npt.NDArray[np.integer[Any]]) -> None:
        """The next tokens of `seq` were routed to `ids` [tokens, L, K]."""
        cells = ids.astype(np.int64) + self._first_cell
        usage = self._usage.get(seq)
        if usage is None:
            usage = self._usage[seq] = np.zeros_like(self._unknown)
            np.add.at(usage, cells.ravel(), 1 / len(cells))
        for token in cells:
            usage *= DECAY
            usage[token.ravel()] += 1 - DECAY
