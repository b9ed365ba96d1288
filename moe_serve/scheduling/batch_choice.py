"""BatchChoice: which of the running sequences decode in the next step, when a step is not wide enough for all.

First come, first served is the default. ExpertAware prefers sequences that are expected to use the same experts,
and experts that are already resident: Read-ME forms batches by the experts its pre-gating router foresees, and
ExpertFlow regroups tokens by predicted expert paths. Here the choice is among sequences that hold their KV pages
anyway, so it moves no memory, and a sequence that was passed over too often goes first, so none starves.

What to expect of a sequence comes from its own recent tokens (moe_serve/expert_routes/usage_forecast.py) or from any
other Forecasts. Knows no torch, no pages and no clock.

Shape alphabet: C candidates, L MoE layers, E experts per layer; a cell is one expert of one layer, L * E of them.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moe_serve.scheduling.sequence import Sequence

Floats = npt.NDArray[np.float32]
FEWEST_DISTINCT_FRAC = 0.85
"""Where a step's tokens, if independent, would use more of a layer's experts than this, there is little to choose."""


class BatchChoice(Protocol):
    """Asked once for each step that cannot take every decoding sequence."""

    def choose(self, decoding: list[Sequence], width: int) -> list[Sequence]:
        """`width` (fewer than there are) of `decoding`, which is in order of admission."""
        ...


class FirstComeFirstServed:
    """The oldest run to their end."""

    def choose(self, decoding: list[Sequence], width: int) -> list[Sequence]:
        return decoding[:width]


class Forecasts(Protocol):
    """How likely a sequence's next token uses each expert."""

    def of(self, sequences: list[Sequence]) -> Floats:
        """[C, L * E], each in 0..1; a sequence without known routes has a row of zeros."""
        ...


class ExpertAware:
    """Starts from the sequence that waited longest; then adds, one by one, that with the fewest further experts."""

    def __init__(
        self,
        forecasts: Forecasts,
        max_skipped: int,
        resident: Callable[[], npt.NDArray[np.bool_]] | None = None,
        can_pay: Callable[[int], bool] = lambda width: True,
    ) -> None:
        """`max_skipped`: steps in a row that a sequence may be passed over; it may be exceeded only when more than
        `width` sequences have waited that long. `resident`: [L * E] experts that cost nothing now. `can_pay(width)`:
        whether choosing is worth it at the moment; if not, those that waited longest are taken."""
        self._forecasts = forecasts
        self._max_skipped = max_skipped
        self._resident = resident
        self._can_pay = can_pay
        self._skipped: collections.Counter[Sequence] = collections.Counter()

    def choose(self, decoding: list[Sequence], width: int) -> list[Sequence]:
        skipped = np.array([self._skipped[seq] for seq in decoding])
        longest_first = np.argsort(-skipped, kind="stable").tolist()
        if self._can_pay(width):
            must = [i for i in longest_first[:width] if skipped[i] >= self._max_skipped] or longest_first[:1]
            chosen = self._complete(decoding, must, width)
        else:
            chosen = longest_first[:width]
        return self._note(decoding, sorted(chosen))

    def _complete(self, decoding: list[Sequence], chosen: list[int], width: int) -> list[int]:
        """Add to `chosen` until there are `width`, each time the one that adds the fewest expected experts."""
        expected = self._forecasts.of(decoding)
        free = None if self._resident is None else self._resident()
        # For each (layer, expert): the probability that no chosen sequence needs it yet and that it must be read.
        missing = np.ones(expected.shape[1], np.float32) if free is None else 1 - RESIDENT_WEIGHT * free
        missing = missing.astype(np.float32, copy=False)
        for i in chosen:
            missing *= 1 - expected[i]
        is_open = np.ones(len(decoding), dtype=bool)
        is_open[chosen] = False
        chosen = list(chosen)
        while len(chosen) < width:
            best = int(np.where(is_open, expected @ missing, np.inf).argmin())
            chosen.append(best)
            is_open[best] = False
            missing *= 1 - expected[best]
        return chosen

    def _note(self, decoding: list[Sequence], chosen: list[int]) -> list[Sequence]:
        """Count who was passed over; sequences that are not here any more are forgotten."""
        taken = [decoding[i] for i in chosen]
        counts = collections.Counter({seq: self._skipped[seq] + 1 for seq in decoding})
        for seq in taken:
            del counts[seq]
        self._skipped = counts
        return taken


RESIDENT_WEIGHT = 0.5
"""A resident expert counts half: it costs no bytes now, but may have been evicted by the time its layer runs."""


def choosing_pays(num_experts: int, top_k: int, width: int, resident_frac: float) -> bool:
    """Whether steps of `width` tokens can be made cheaper by choosing them: not with few experts, wide steps, or all
    experts resident. A uniform router would use 1 - (1 - K/E)^width of a layer's experts."""
    distinct_frac = 1 - (1 - top_k / num_experts) ** width
    return resident_frac < 1 and distinct_frac <= FEWEST_DISTINCT_FRAC and width > 1
