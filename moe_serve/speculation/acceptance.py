"""Acceptance: how likely the next guess about a sequence is right, from how its own and others' guesses fared.

Knows sequences and numbers of guesses; knows no tokens and no times.
"""

from __future__ import annotations

from moe_serve.scheduling.sequence import Sequence

PRIOR = 0.6
"""Before anything was checked."""
OTHERS_WEIGHT = 3.0
"""Checked guesses of its own that weigh as much as what is known of others."""
OWN_DECAY = 0.8
"""Per step: text changes between what is copied and what is new."""
OTHERS_DECAY = 0.99


class _Counts:
    """Guesses that were checked, and those of them that were right; older ones count less."""

    __slots__ = ("checked", "right")

    def __init__(self, right: float = 0.0, checked: float = 0.0) -> None:
        self.right = right
        self.checked = checked

    def add(self, right: int, checked: int, decay: float) -> None:
        self.right = decay * self.right + right
        self.checked = decay * self.checked + checked


class Acceptance:
    """Chances by sequence, which start from those by length of the match."""

    def __init__(self) -> None:
        self._by_match: dict[int, _Counts] = {}
        self._by_seq: dict[Sequence, _Counts] = {}

    def chance(self, seq: Sequence, match: int) -> float:
        """That a token guessed behind a match is right, if those before it are."""
        others = self._by_match.get(match)
        prior = PRIOR if others is None else (others.right + PRIOR) / (others.checked + 1)
        own = self._by_seq.get(seq)
        if own is None:
            return prior
        return (own.right + OTHERS_WEIGHT * prior) / (own.checked + OTHERS_WEIGHT)

    def learn(self, seq: Sequence, match: int, num_drafts: int, num_right: int) -> None:
        """Of `num_drafts` guesses the first `num_right` were right; nothing is known of those behind the next one."""
        checked = min(num_right + 1, num_drafts)
        self._by_seq.setdefault(seq, _Counts()).add(num_right, checked, OWN_DECAY)
        self._by_match.setdefault(match, _Counts()).add(num_right, checked, OTHERS_DECAY)

    def forget_finished(self) -> None:
        for seq in [s for s in self._by_seq if s.is_finished]:
            del self._by_seq[seq]
